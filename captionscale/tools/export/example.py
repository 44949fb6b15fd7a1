"""Caption images with the exported programs in this folder.

    python example.py photo.jpg --beam 5

It needs numpy, onnxruntime and pillow, and nothing else.
"""

import argparse
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

HERE = Path(__file__).parent
PAD, START, END, UNK = range(4)


@cache
def load(name: str) -> Any:
    """Load one of the three programs."""
    return onnxruntime.InferenceSession(HERE / f"{name}.onnx", providers=["CPUExecutionProvider"])


def run(program: Any, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    """Run a program on rows of inputs, and return its outputs by their names."""
    size = program.get_inputs()[0].shape[0]
    rows = len(next(iter(inputs.values())))
    if isinstance(size, int):  # Exported with --batch-size: filled up with the last row.
        if rows > size:
            raise SystemExit(
                f"{rows} rows, but this was exported with --batch-size {size}: take --beam {size}"
            )
        inputs = {
            name: np.concatenate([value, np.repeat(value[-1:], size - rows, 0)])
            for name, value in inputs.items()
        }
    names = [output.name for output in program.get_outputs()]
    return {name: value[:rows] for name, value in zip(names, program.run(names, inputs), strict=True)}


def load_image(path: Path, size: int, interpolation: str) -> np.ndarray:
    """Return an image's center square as the encoder takes it: bytes, channels first."""
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    square = square.resize((size, size), Image.Resampling[interpolation.upper()])
    return np.asarray(square).transpose(2, 0, 1)[None]


def search(image: np.ndarray, beam: int, length_penalty: float, max_words: int) -> tuple[list[int], float]:
    """Return the best caption's tokens and log-probability; a beam of one is greedy search."""
    encoder, start, step = (load(name) for name in ("encoder", "start", "step"))
    state = run(start, features=run(encoder, images=image)["features"])
    alive: list[tuple[float, list[int]]] = [(0.0, [])]
    done: list[tuple[float, list[int]]] = []
    tokens = np.array([START])
    for _ in range(max_words):
        out = run(step, tokens=tokens, **state)
        logits = out["logits"] - out["logits"].max(1, keepdims=True)
        totals = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        totals += np.array([[total] for total, _ in alive], totals.dtype)
        totals[:, [PAD, START, UNK]] = -np.inf
        # A finished caption stays in the beam until better ones replace it.
        places = [divmod(int(place), totals.shape[1]) for place in np.argsort(-totals, axis=None)[:beam]]
        longer = [(float(totals[row, word]), alive[row][1] + [word], row) for row, word in places]
        best = sorted([*longer, *((*caption, -1) for caption in done)], key=lambda caption: -caption[0])[
            :beam
        ]
        done = [(total, ids) for total, ids, _ in best if ids[-1] == END]
        rows = [row for _, ids, row in best if ids[-1] != END]
        alive = [(total, ids) for total, ids, _ in best if ids[-1] != END]
        if not alive:
            break
        # The step's outputs next_... replace their part of the state.
        state = {name: out.get(f"next_{name}", value)[rows] for name, value in state.items()}
        tokens = np.array([ids[-1] for _, ids in alive])
    total, ids = max(done + alive, key=lambda caption: caption[0] / len(caption[1]) ** length_penalty)
    return ids, total


def main() -> None:
    """Caption the images of the command line."""
    settings = json.loads((HERE / "export.json").read_text(encoding="utf-8"))
    words = json.loads((HERE / "vocab.json").read_text(encoding="utf-8"))["words"]
    parser = argparse.ArgumentParser()
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--beam", type=int, default=settings["beam"], help="1: greedy (default: %(default)s)")
    options = parser.parse_args()
    for path in options.images:
        try:
            image = load_image(path, settings["image_size"], settings["interpolation"])
        except (OSError, Image.DecompressionBombError) as error:
            raise SystemExit(f"{path}: no readable image ({error}); repair or remove it") from None
        tokens, _ = search(image, options.beam, settings["length_penalty"], settings["max_words"])
        print(f"{path}\t{' '.join(words[token] for token in tokens if token != END)}")


if __name__ == "__main__":
    main()
