"""The command `export`: write a run as ONNX graphs, PyTorch programs, or a Hugging Face hub folder."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import UInt8
from safetensors.torch import save
from torch import Tensor

from captionscale.config import Config
from captionscale.data.decode import decode_image
from captionscale.data.shards import Split
from captionscale.data.storage import open_storage
from captionscale.data.transforms import center_crop
from captionscale.errors import UserError
from captionscale.files import not_writable
from captionscale.model.encoders.encoder import interpolation_of
from captionscale.progress import spinner
from captionscale.tools.export import example
from captionscale.tools.export.card import model_card
from captionscale.tools.export.check import check
from captionscale.tools.export.parts import ExportedCaptioner, Part, Run, parts
from captionscale.tools.export.programs import write_onnx, write_torch
from captionscale.train.checkpoint import open_checkpoint
from captionscale.train.checkpoint_writer import write_metadata
from captionscale.train.run_folder import MODEL_FILE, VOCAB_FILE
from captionscale.version import __version__

Kind = Literal["onnx", "torch", "hub"]

FORMAT = 1
_IMAGES = 100
_EXAMPLE_BATCH = 2
_WRITERS: dict[str, Callable[[Part, Path, int | None], Run]] = {"onnx": write_onnx, "torch": write_torch}


def export(run: Path, to: Kind, out: Path, *, batch: int | None, shards: str | None, checkpoint: str) -> str:
    """Export a run, check the programs against it, and return a line about the result.

    Args:
        run: The --out of captionscale train.
        to: The format.
        out: A new folder, written atomically.
        batch: Fixed batch size of the programs; None: any.
        shards: Shards with the images to check on, instead of the run's own.
        checkpoint: `best`, `last` or a step.

    Raises:
        UserError: No run, an existing folder, a missing package, no images to check on, programs that differ
            from the model, or a folder that cannot be written.
    """
    if to == "onnx" and (
        missing := [it for it in ("onnx", "onnxruntime", "onnxscript") if not find_spec(it)]
    ):
        raise UserError(
            f"export: {', '.join(missing)} is not installed, expected it for --format onnx;"
            " pip install 'captionscale[export]'"
        )
    if batch is not None and (batch < 1 or to == "hub"):
        raise UserError(
            f"--batch-size {batch}: expected at least 1, and --format onnx or torch; leave it out"
        )
    saved = open_checkpoint(run, checkpoint)
    config = saved.config()
    with _new(out) as folder:
        if to == "hub":
            weights = {name: it.contiguous() for name, it in saved.captioner().state_dict().items()}
            # save_file raises an undocumented error on a full disk.
            (folder / MODEL_FILE).write_bytes(save(weights))
            write_metadata(folder, saved.train_state, {}, _without_paths(config), saved.vocabulary())
            checked = None
        else:
            images = _images(config, shards)
            captioner = saved.captioner()
            made = parts(captioner, config.data.image_size, batch or _EXAMPLE_BATCH)
            programs = {}
            for part in made:
                with spinner(f"exporting {part.name}"):
                    programs[part.name] = _WRITERS[to](part, folder, batch)
            exported = ExportedCaptioner(made, programs, batch)
            checked = check(captioner, exported, images, config.data.max_words)
            saved.vocabulary().save(folder / VOCAB_FILE)
        if to == "onnx":
            shutil.copy(example.__file__, folder / "example.py")
        # The hub expects this name.
        name = "config.json" if to == "hub" else "export.json"
        settings = {
            "format": FORMAT,
            "library_name": "captionscale",
            "library_version": __version__,
            "model_type": f"{config.model.encoder.name}-{config.model.decoder.name}",
            "image_size": config.data.image_size,
            "interpolation": interpolation_of(config.model),
            "max_words": config.data.max_words,
            "beam": config.search.beam,
            "length_penalty": config.search.length_penalty,
            "batch_size": batch,
            "weights_sha256": saved.sha256,
            "checked": checked and asdict(checked),
        }
        (folder / name).write_text(json.dumps(settings, indent=1), encoding="utf-8")
        card = model_card(run, saved, to, checked, shards)
        (folder / "README.md").write_text(card, encoding="utf-8")
    if checked is None:
        return f"{out}: complete; load it with captionscale.load({str(out)!r}), and review its README.md"
    return (
        f"{out}: checked on {checked.images} images of split '{config.data.val_split}': greatest difference"
        f" of logits {checked.logits:.1e} (at most {checked.tolerance:g}), the same captions by greedy search"
    )


@contextmanager
def _new(out: Path) -> Iterator[Path]:
    """Yield a folder that gets its name once it is complete."""
    if out.exists():
        raise UserError(f"{out}: exists already, expected a new folder; remove it, or choose another --out")
    # A folder of this name was left by a killed export.
    partial = out.with_name(f".{out.name}.captionscale-export")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(out)
    except OSError as error:
        raise not_writable(out, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _images(config: Config, shards: str | None) -> UInt8[Tensor, "image 3 height width"]:
    """Return the first images of the validation split as the encoder sees them."""
    data, interpolation = config.data, interpolation_of(config.model)
    try:
        split = Split(open_storage(shards or data.shards, data.cache, data.cache_gb), data.val_split)
    except UserError as error:
        raise UserError(
            f"export: found no images to check on ({error}), expected the run's shards; pass --shards DIR"
        ) from None
    views = [
        center_crop(decode_image(split.image(item), f"image {item}"), data.image_size, interpolation)
        for item in range(min(len(split), _IMAGES))
    ]
    return torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).contiguous()


def _without_paths(config: Config) -> Config:
    """Return the config without the folders of this machine."""
    encoder, train = config.model.encoder, config.train
    encoder = encoder.model_copy(update={"weights": Path(encoder.weights).name})
    sections = {
        "data": config.data.model_copy(update={"shards": Path(config.data.shards).name, "cache": None}),
        "model": config.model.model_copy(update={"encoder": encoder}),
        "train": train.model_copy(update={"init_from": train.init_from and Path(train.init_from.name)}),
    }
    return config.model_copy(update=sections)
