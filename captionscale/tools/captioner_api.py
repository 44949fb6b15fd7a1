"""`CaptionPipeline`, which `captionscale.load` returns: a run's model, ready to caption images."""

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
from captionscale.model.encoders.encoder import interpolation_of
from captionscale.model.search.constraints import Constraints
from captionscale.tools.caption_result import CaptionResult, View, build_caption_results, encode_views
from captionscale.tools.ensemble import CheckpointEnsemble
from captionscale.train.generation import generate_tokens, make_constraints


@dataclass(frozen=True)
class GenerationRequest:
    """Validated search settings, constraints and seed."""

    search: config.Search
    constraints: Constraints
    seed: int


class CaptionPipeline:
    """A run's model, or several as an ensemble, on the GPU if there is one."""

    def __init__(self, ensemble: CheckpointEnsemble):
        self.ensemble = ensemble
        self.vocabulary = ensemble.checkpoints[0].vocabulary()
        self.captioner = ensemble.captioner().to("cuda" if torch.cuda.is_available() else "cpu")

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
            images: Files or Pillow images, of any size.
            prefix: Beginning of every caption.
            require: Words that every caption contains.
            seed: Of sampled captions, which depend on it and on their image's position; None: the run's.
            search: Keys of the config's section `search`, such as `beam=3` or `method="sample"`, replacing
                the run's own.

        Raises:
            UserError: A file that is missing or no image, an unknown key, or constraints that cannot be met.
        """
        if isinstance(images, str | Path | Image.Image):
            raise ValueError("images: found one image, expected a list; write [image]")
        request = self.generation_request(prefix=prefix, require=require, seed=seed, **search)
        views = [self.view(image) for image in images]
        return self.generate_best(views, request, range(len(views)))

    def generation_request(
        self, *, prefix: str = "", require: Sequence[str] = (), seed: int | None = None, **search: Any
    ) -> GenerationRequest:
        """Validate how captions are to be generated; as `caption`."""
        changes = [f"search.{key}={json.dumps(value)}" for key, value in search.items() if value is not None]
        settings = toml.override(self.ensemble.config, changes, "search", option="")
        constraints = make_constraints(
            settings.search, self.vocabulary, settings.data.max_words, prefix=prefix, require=require
        )
        return GenerationRequest(settings.search, constraints, settings.seed if seed is None else seed)

    def view(self, image: Path | str | Image.Image) -> View:
        """Return what the model sees of an image: its center square."""
        if isinstance(image, Image.Image):
            return self.center_crop(decode.pil_to_rgb(image))
        return self.center_crop(decode.read_image(Path(image)))

    def center_crop(self, image: UInt8[np.ndarray, "height width 3"]) -> View:
        """Return what the model sees of an image's pixels."""
        config = self.ensemble.config
        return center_crop(image, config.data.image_size, interpolation_of(config.model))

    def generate_best(
        self, views: Sequence[View], request: GenerationRequest, numbers: Sequence[int]
    ) -> list[CaptionResult]:
        """Return the best caption of each of any number of images, in batches; as `generate`."""
        size = request.search.batch_size
        parts = (slice(first, first + size) for first in range(0, len(views), size))
        return [found[0] for part in parts for found in self.generate(views[part], request, numbers[part])]

    def generate(
        self,
        views: Sequence[View],
        request: GenerationRequest,
        numbers: Sequence[int],
        *,
        return_all: bool = False,
    ) -> list[list[CaptionResult]]:
        """Return the captions of each of a batch of images, best first.

        Args:
            views: What the model sees of each.
            request: How captions are to be generated.
            numbers: Of each image; a sampled caption is a function of it and the seed.
            return_all: All final captions of a beam search instead of the best.
        """
        features, data = encode_views(self.captioner, views), self.ensemble.config.data
        found = generate_tokens(
            self.captioner.decoder,
            features,
            request.search,
            data.max_words,
            request.constraints,
            [(request.seed, number) for number in numbers],
        )
        if not return_all:
            found = [captions[:1] for captions in found]
        rows = [image for image, captions in enumerate(found) for _ in captions]
        flat = [tokens for captions in found for tokens in captions]
        seen = features[rows] if isinstance(features, torch.Tensor) else tuple(it[rows] for it in features)
        results = iter(build_caption_results(self.captioner, seen, flat, self.vocabulary, data.image_size))
        return [[next(results) for _ in captions] for captions in found]
