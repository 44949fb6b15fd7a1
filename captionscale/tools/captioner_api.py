"""A model that is ready to caption images from anywhere: what `captionscale.load` returns."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image

from captionscale import config, toml
from captionscale.data import decode
from captionscale.data.transforms import center_crop
from captionscale.model.search.constraints import Constraints
from captionscale.tools.caption_result import CaptionResult, View, build_caption_results, encode_views
from captionscale.tools.ensemble import CheckpointEnsemble
from captionscale.train.generation import generate_tokens, make_constraints


@dataclass(frozen=True)
class GenerationRequest:
    """How captions are to be found, proven to be possible."""

    search: config.Search
    constraints: Constraints
    seed: int
    """Of sampled captions."""


class CaptionPipeline:
    """A run's model, or several as an ensemble, on the GPU if there is one."""

    def __init__(self, members: CheckpointEnsemble):
        self.ensemble = members
        self.vocabulary = members.checkpoints[0].vocabulary()
        self.captioner = members.captioner().to("cuda" if torch.cuda.is_available() else "cpu")

    def caption(
        self,
        images: Iterable[Path | str | Image.Image],
        *,
        prefix: str = "",
        require: Sequence[str] = (),
        seed: int | None = None,
        **search: Any,
    ) -> list[CaptionResult]:
        """Return the best caption of each image, or a sampled one.

        Args:
            images: Files, or images of Pillow's, of any size.
            prefix: What every caption begins with.
            require: Words that every caption holds.
            seed: Of sampled captions, which depend on it and on their image's place; none: the run's.
            search: Keys of the config's section `search`, such as `beam=3` or `method="sample"`, instead of
                the run's own.

        Raises:
            UserError: A file that is missing or no image, an unknown key, or a wish that cannot be fulfilled.
        """
        if isinstance(images, str | Path | Image.Image):
            raise ValueError("wanted a list of images, found one; write [image]")
        generation_request = self.generation_request(prefix=prefix, require=require, seed=seed, **search)
        views = [self.view(image) for image in images]
        return self.generate_best(views, generation_request, range(len(views)))

    def generation_request(
        self, *, prefix: str = "", require: Sequence[str] = (), seed: int | None = None, **search: Any
    ) -> GenerationRequest:
        """Settle how captions are to be found; as `caption`."""
        settings = self.ensemble.config
        overrides = [
            f"search.{key}={json.dumps(value)}" for key, value in search.items() if value is not None
        ]
        settings = toml.override(settings, overrides, "search", option="")
        constraints = make_constraints(
            settings.search, self.vocabulary, settings.data.max_words, prefix=prefix, require=require
        )
        return GenerationRequest(settings.search, constraints, settings.seed if seed is None else seed)

    def view(self, image: Path | str | Image.Image) -> View:
        """Return what the model sees of an image: its centre square."""
        if isinstance(image, Image.Image):
            return self.center_crop(decode.pil_to_rgb(image))
        return self.center_crop(decode.read_image(Path(image)))

    def center_crop(self, image: UInt8[np.ndarray, "height width 3"]) -> View:
        """Return what the model sees of an image's pixels."""
        return center_crop(image, self.ensemble.config.data.image_size)

    def generate_best(
        self, views: Sequence[View], generation_request: GenerationRequest, numbers: Sequence[int]
    ) -> list[CaptionResult]:
        """Return the best caption of each of any number of images; as `generate`."""
        size = generation_request.search.batch_size
        parts = (slice(first, first + size) for first in range(0, len(views), size))
        return [
            found[0]
            for part in parts
            for found in self.generate(views[part], generation_request, numbers[part])
        ]

    def generate(
        self,
        views: Sequence[View],
        generation_request: GenerationRequest,
        numbers: Sequence[int],
        *,
        return_all: bool = False,
    ) -> list[list[CaptionResult]]:
        """Return the captions of each of a batch of images, best first.

        Args:
            views: What the model sees of each.
            generation_request: How captions are to be found.
            numbers: Of each image, of which and of the seed its sampled caption is a function.
            return_all: All that a beam search ends with, not the best alone.
        """
        features, decoder = encode_views(self.captioner, views), self.captioner.decoder
        found = generate_tokens(
            decoder,
            features,
            generation_request.search,
            self.ensemble.config.data.max_words,
            generation_request.constraints,
            [(generation_request.seed, number) for number in numbers],
        )
        if not return_all:
            found = [captions[:1] for captions in found]
        image_index = [image for image, captions in enumerate(found) for _ in captions]
        flat = [tokens for captions in found for tokens in captions]
        seen = (
            features[image_index]
            if isinstance(features, torch.Tensor)
            else tuple(it[image_index] for it in features)
        )
        gazes = iter(build_caption_results(decoder, seen, flat, self.vocabulary))
        return [[next(gazes) for _ in captions] for captions in found]
