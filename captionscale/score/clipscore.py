"""CLIPScore: does a caption fit its image, as CLIP sees it?"""

import logging
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int
from PIL import Image
from torch import Tensor

from captionscale.data.decode import decode_pil
from captionscale.data.shards import Split
from captionscale.errors import UserError, did_you_mean
from captionscale.files import sha256_of
from captionscale.machine import cpu_count
from captionscale.progress import Bar, progress
from captionscale.score.optional_metrics import OptionalMetrics

PROMPT = "A photo depicts "
WEIGHT = 2.5
MODEL = "ViT-B-32-quickgelu"
"""The paper's, OpenAI's ViT-B/32: its activation is the quick GELU."""

Rows = Float[np.ndarray, "row feature"]


class Clip(NamedTuple):
    """A CLIP with the functions that prepare what it reads, as open_clip makes them."""

    model: Any
    preprocess: Callable[[Image.Image], Tensor]
    tokenizer: Callable[[list[str]], Tensor]
    device: torch.device
    signature: str


def clip_s(
    images: Float[np.ndarray, "image feature"], captions: Float[np.ndarray, "image feature"]
) -> Float64[np.ndarray, "image"]:
    """Return each caption's CLIP-S, 0 to 2.5.

    Args:
        images: CLIP's features.
        captions: CLIP's features of `PROMPT` and the caption.

    Source:
        Hessel et al. 2021, "CLIPScore: A Reference-free Evaluation Metric for Image Captioning"
        (arXiv:2104.08718), section 3.
    """
    cosines: Float64[np.ndarray, "image"] = (_unit(images) * _unit(captions)).sum(axis=1)
    scores: Float64[np.ndarray, "image"] = WEIGHT * np.maximum(cosines, 0.0)
    return scores


def ref_clip_s(
    scores: Float64[np.ndarray, "image"],
    captions: Float[np.ndarray, "image feature"],
    references: Float[np.ndarray, "reference feature"],
    counts: Int[np.ndarray, "image"],
) -> Float64[np.ndarray, "image"]:
    """Return each caption's RefCLIPScore: CLIP-S and the likeness to the nearest reference, harmonic mean.

    Args:
        scores: CLIP-S.
        captions: CLIP's features of the prompted captions.
        references: Those of the prompted references, all of the first image first.
        counts: How many references each image has, at least one.

    Source:
        As `clip_s`; where one of both is 0, so is the mean.
    """
    likeness = (np.repeat(_unit(captions), counts, axis=0) * _unit(references)).sum(axis=1)
    nearest = np.maximum(np.maximum.reduceat(likeness, np.cumsum(counts) - counts), 0.0)
    total = scores + nearest
    total[total == 0] = 1.0
    means: Float64[np.ndarray, "image"] = 2 * scores * nearest / total
    return means


def measure(
    split: Split,
    captions: Mapping[int, str],
    references: Mapping[int, Sequence[str]],
    clip: Clip,
    *,
    batch: int = 64,
) -> OptionalMetrics:
    """Compute CLIPScore and RefCLIPScore of one caption for each image of a split.

    Args:
        split: Its images are read.
        captions: The caption of each image, as it was written.
        references: The human captions of each image.
        clip: Which `load` returns.
        batch: Images or texts that CLIP reads at once.

    Raises:
        UserError: A damaged image.

    Source:
        As `clip_s`.  Everything is fp32, as the authors' code is on a CPU; on a GPU theirs is fp16, which
        changes the third digit.
    """
    clip.model.to(clip.device)
    items = np.argsort(split.index["image_id"], kind="stable")
    image_ids = [int(image_id) for image_id in split.index["image_id"][items]]
    human = [references[image_id] for image_id in image_ids]
    flat = [text for group in human for text in group]
    with progress("CLIPScore", len(items) * 2 + len(flat), transient=True) as bar:
        candidates = _texts(clip, [captions[image_id] for image_id in image_ids], batch, bar)
        others = _texts(clip, flat, batch, bar)
        images = _images(clip, split, items, batch, bar)
    scores = clip_s(images, candidates)
    counts = np.array([len(group) for group in human])
    return OptionalMetrics(
        {"CLIPScore": scores, "RefCLIPScore": ref_clip_s(scores, candidates, others, counts)}, clip.signature
    )


def load(weights: Path, name: str = MODEL) -> Clip:
    """Load a CLIP from a file; nothing is downloaded.

    The model stays in the main memory until `measure` takes it to the device.

    Args:
        weights: What open_clip saves, a state dict in PyTorch's or the safetensors format, or one of OpenAI's
            own files, such as ViT-B-32.pt.
        name: Of open_clip's model.

    Raises:
        UserError: open_clip is not installed, knows no such model, or the file is not that model's.
    """
    try:
        import open_clip
    except ImportError:
        raise UserError(
            "open_clip: not installed, but CLIPScore needs it; pip install 'captionscale[clip]', or leave"
            " out --clip"
        ) from None
    if not weights.is_file():
        found = "a folder" if weights.is_dir() else "no such file"
        raise UserError(
            f"{weights}: {found}, wanted CLIP's weights, which are never downloaded; fetch them, such as"
            " OpenAI's ViT-B-32.pt, and give their path as --clip"
        )
    configuration = open_clip.get_model_config(name)
    if configuration is None:
        raise UserError(f"--clip-model: unknown '{name}'; {did_you_mean(name, open_clip.list_models())}")
    if configuration["text_cfg"].keys() & {"hf_model_name", "hf_tokenizer_name"}:
        raise UserError(
            f"--clip-model: {name} reads its tokenizer from the internet, wanted a model that open_clip"
            f" carries whole; take another, such as {MODEL}"
        )
    archive = _is_torchscript(weights)
    if archive and not configuration.get("quick_gelu"):
        raise UserError(
            f"{weights}: OpenAI's own weights, which have the quick GELU, but --clip-model {name} has not;"
            f" take --clip-model {name}-quickgelu"
        )
    try:
        # By an absolute path: a bare name such as `openai` is a tag, and is downloaded.
        file = None if archive else str(weights.resolve())
        with _quietly():
            model, _, preprocess = open_clip.create_model_and_transforms(
                name, pretrained=file, precision="fp32"
            )
            if archive:
                model.load_state_dict(_of_archive(weights))
    # What a damaged or foreign file makes PyTorch and pickle raise is of many kinds.
    except Exception as error:
        raise UserError(
            f"{weights}: no weights of {name} ({' '.join(str(error).split()):.200}); name their model by"
            " --clip-model, or fetch the file again"
        ) from None
    return Clip(
        model=model.eval(),
        preprocess=preprocess,
        tokenizer=open_clip.get_tokenizer(name),
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        signature=f"clipscore open_clip-{open_clip.__version__} {name} sha256={sha256_of(weights)}",
    )


@contextmanager
def _quietly() -> Iterator[None]:
    # open_clip warns of a model without weights, which come next; PyTorch of the format of OpenAI's files.
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as file:
        return any(name.endswith("/constants.pkl") for name in file.namelist())


def _of_archive(path: Path) -> dict[str, Tensor]:
    facts = {"input_resolution", "context_length", "vocab_size"}
    state = torch.jit.load(str(path), map_location="cpu").state_dict()  # type: ignore[no-untyped-call]
    return {name: tensor.float() for name, tensor in state.items() if name not in facts}


@torch.inference_mode()
def _texts(clip: Clip, texts: Sequence[str], batch: int, bar: Bar) -> Rows:
    rows = []
    for start in range(0, len(texts), batch):
        prompted = [PROMPT + text for text in texts[start : start + batch]]
        rows.append(clip.model.encode_text(clip.tokenizer(prompted).to(clip.device)).float().cpu().numpy())
        bar.advance(len(prompted))
    return np.concatenate(rows)


@torch.inference_mode()
def _images(clip: Clip, split: Split, items: Int[np.ndarray, "image"], batch: int, bar: Bar) -> Rows:
    rows = []
    for views in _views(clip, split, items, batch):
        rows.append(clip.model.encode_image(views.to(clip.device)).float().cpu().numpy())
        bar.advance(len(views))
    return np.concatenate(rows)


def _views(
    clip: Clip, split: Split, items: Int[np.ndarray, "image"], batch: int
) -> Iterator[Float32[Tensor, "image 3 height width"]]:
    def view(item: int) -> Tensor:
        place = f"{split.storage}: image {split.index['image_id'][item]}"
        return clip.preprocess(decode_pil(split.image(item), place))

    with ThreadPoolExecutor(cpu_count()) as threads:
        for start in range(0, len(items), batch):
            yield torch.stack(list(threads.map(view, map(int, items[start : start + batch]))))


def _unit(rows: Float[np.ndarray, "row feature"]) -> Float64[np.ndarray, "row feature"]:
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    unit: Float64[np.ndarray, "row feature"] = rows / np.maximum(lengths, np.finfo(np.float64).tiny)
    return unit
