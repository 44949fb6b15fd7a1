"""CLIPScore: how well a caption fits its image, according to CLIP."""

import logging
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from PIL import Image
from torch import Tensor

from captionscale.data.decode import decode_image
from captionscale.data.shards import Split
from captionscale.errors import UserError, did_you_mean
from captionscale.files import sha256_of
from captionscale.machine import cpu_count
from captionscale.progress import Bar, progress
from captionscale.score.metric import ComputedMetric

PROMPT = "A photo depicts "
WEIGHT = 2.5
# Images or texts in one forward pass.
_BATCH = 64
MODEL = "ViT-B-32-quickgelu"
"""The paper's model, OpenAI's ViT-B/32, whose activation is the quick GELU."""


class Clip(NamedTuple):
    """A CLIP model with its preprocessing, from open_clip."""

    model: Any
    preprocess: Callable[[Image.Image], Tensor]
    tokenizer: Callable[[list[str]], Tensor]
    device: torch.device
    signature: str


def clip_s(
    images: Float[np.ndarray, "image feature"], captions: Float[np.ndarray, "image feature"]
) -> Float64[np.ndarray, "image"]:
    """Return each caption's CLIP-S, 0 to 2.5, from CLIP's features of images and prompted captions.

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
    """Return each caption's RefCLIPScore: harmonic mean of CLIP-S and the cosine to the nearest reference.

    Args:
        scores: CLIP-S.
        captions: CLIP's features of the prompted captions.
        references: Those of the prompted references, all of the first image first.
        counts: How many references each image has, at least one.

    Source:
        As `clip_s`; the mean is 0 where one of the two is.
    """
    cosines = (np.repeat(_unit(captions), counts, axis=0) * _unit(references)).sum(axis=1)
    nearest = np.maximum(np.maximum.reduceat(cosines, np.cumsum(counts) - counts), 0.0)
    total = scores + nearest
    total[total == 0] = 1.0
    means: Float64[np.ndarray, "image"] = 2 * scores * nearest / total
    return means


def measure(
    split: Split,
    captions: Mapping[int, str],
    references: Mapping[int, Sequence[str]],
    clip: Clip,
) -> list[ComputedMetric]:
    """Compute CLIPScore and RefCLIPScore of one caption for each image of a split.

    Args:
        split: Its images are read.
        captions: The caption of each image, not tokenized.
        references: One or more for each image.
        clip: From `load`.

    Raises:
        UserError: A damaged image.

    Source:
        As `clip_s`. Everything is fp32, as in the authors' code on a CPU; theirs is fp16 on a GPU, which
        changes the third digit.
    """
    clip.model.to(clip.device)
    items = np.argsort(split.index["image_id"], kind="stable")
    image_ids = [int(image_id) for image_id in split.index["image_id"][items]]
    own = [captions[image_id] for image_id in image_ids]
    groups = [references[image_id] for image_id in image_ids]
    flat = list(chain.from_iterable(groups))
    with progress("CLIPScore", len(items) * 2 + len(flat), transient=True) as bar:
        candidates, others = (
            _encode(clip, clip.model.encode_text, _tokens(clip, texts), bar) for texts in (own, flat)
        )
        images = _encode(clip, clip.model.encode_image, _images(clip, split, items), bar)
    scores = clip_s(images, candidates)
    counts = np.array([len(group) for group in groups])
    with_references = ref_clip_s(scores, candidates, others, counts)
    return [
        ComputedMetric("CLIPScore", scores, clip.signature, (0.0, WEIGHT)),
        ComputedMetric("RefCLIPScore", with_references, clip.signature, (0.0, WEIGHT)),
    ]


def load(weights: Path, name: str = MODEL) -> Clip:
    """Load a CLIP model from a file into main memory; nothing is downloaded.

    Args:
        weights: A state dict in PyTorch's or the safetensors format, as open_clip saves it, or one of
            OpenAI's own files, such as ViT-B-32.pt.
        name: Of open_clip's model.

    Raises:
        UserError: open_clip is not installed or has no such model, or the file is of another one.
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
            f"{weights}: {found}, expected CLIP's weights, which are never downloaded; get them, such as"
            " OpenAI's ViT-B-32.pt, and give their path as --clip"
        )
    configuration = open_clip.get_model_config(name)
    if configuration is None:
        raise UserError(f"--clip-model: unknown '{name}'; {did_you_mean(name, open_clip.list_models())}")
    if configuration["text_cfg"].keys() & {"hf_model_name", "hf_tokenizer_name"}:
        raise UserError(
            f"--clip-model: {name} downloads its tokenizer, expected a model that open_clip contains whole;"
            f" take another, such as {MODEL}"
        )
    archive = _is_torchscript(weights)
    if archive and not configuration.get("quick_gelu"):
        raise UserError(
            f"{weights}: OpenAI's own weights, with the quick GELU, but --clip-model {name} is without it;"
            f" take --clip-model {name}-quickgelu"
        )
    try:
        # An absolute path, because a bare name such as `openai` is a tag, and would be downloaded.
        file = None if archive else str(weights.resolve())
        with _without_warnings():
            model, _, preprocess = open_clip.create_model_and_transforms(
                name, pretrained=file, precision="fp32"
            )
            if archive:
                model.load_state_dict(_torchscript_state(weights))
    # PyTorch and pickle raise errors of many types on a damaged or foreign file.
    except Exception as error:
        raise UserError(
            f"{weights}: no weights of {name} ({' '.join(str(error).split()):.200}), expected these; name"
            " their model by --clip-model, or get the file again"
        ) from None
    return Clip(
        model=model.eval(),
        preprocess=preprocess,
        tokenizer=open_clip.get_tokenizer(name),
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        signature=f"clipscore open_clip-{open_clip.__version__} {name} sha256={sha256_of(weights)}",
    )


@contextmanager
def _without_warnings() -> Iterator[None]:
    # open_clip warns that the model has no weights yet, PyTorch that the format of OpenAI's files is old.
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as file:
        return any(name.endswith("/constants.pkl") for name in file.namelist())


def _torchscript_state(path: Path) -> dict[str, Tensor]:
    constants = {"input_resolution", "context_length", "vocab_size"}
    state = torch.jit.load(str(path), map_location="cpu").state_dict()  # type: ignore[no-untyped-call]
    return {name: tensor.float() for name, tensor in state.items() if name not in constants}


@torch.inference_mode()
def _encode(
    clip: Clip, encoder: Callable[[Tensor], Tensor], batches: Iterable[Tensor], bar: Bar
) -> Float[np.ndarray, "row feature"]:
    features = []
    for batch in batches:
        features.append(encoder(batch.to(clip.device)).float().cpu().numpy())
        bar.advance(len(batch))
    return np.concatenate(features)


def _tokens(clip: Clip, texts: Sequence[str]) -> Iterator[Tensor]:
    for start in range(0, len(texts), _BATCH):
        yield clip.tokenizer([PROMPT + text for text in texts[start : start + _BATCH]])


def _images(clip: Clip, split: Split, items: Int[np.ndarray, "image"]) -> Iterator[Tensor]:
    def preprocess(item: int) -> Tensor:
        place = f"{split.storage}: image {split.index['image_id'][item]}"
        return clip.preprocess(Image.fromarray(decode_image(split.image(item), place)))

    with ThreadPoolExecutor(cpu_count()) as threads:
        for start in range(0, len(items), _BATCH):
            yield torch.stack(list(threads.map(preprocess, map(int, items[start : start + _BATCH]))))


def _unit(rows: Float[np.ndarray, "row feature"]) -> Float64[np.ndarray, "row feature"]:
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    unit: Float64[np.ndarray, "row feature"] = rows / np.maximum(lengths, np.finfo(np.float64).tiny)
    return unit
