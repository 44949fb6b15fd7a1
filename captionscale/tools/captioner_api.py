"""A model that is ready to caption pictures from anywhere: what `captionscale.load` returns."""

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
from captionscale.data.transforms import centre_view
from captionscale.model.search.constraints import Rules
from captionscale.tools.caption_result import Gaze, View, features_of, look_again
from captionscale.tools.ensemble import Members
from captionscale.train.generation import find_captions, make_rules


@dataclass(frozen=True)
class Wish:
    """How captions are to be found, proven to be possible."""

    search: config.Search
    rules: Rules
    seed: int
    """Of sampled captions."""


class Writer:
    """A run's model, or several as an ensemble, on the GPU if there is one."""

    def __init__(self, members: Members):
        self.members = members
        self.vocabulary = members.saved[0].vocabulary()
        self.captioner = members.captioner().to("cuda" if torch.cuda.is_available() else "cpu")

    def caption(
        self,
        pictures: Iterable[Path | str | Image.Image],
        *,
        prefix: str = "",
        require: Sequence[str] = (),
        seed: int | None = None,
        **search: Any,
    ) -> list[Gaze]:
        """Return the best caption of each picture, or a sampled one.

        Args:
            pictures: Files, or pictures of Pillow's, of any size.
            prefix: What every caption begins with.
            require: Words that every caption holds.
            seed: Of sampled captions, which depend on it and on their picture's place; none: the run's.
            search: Keys of the config's section `search`, such as `beam=3` or `method="sample"`, instead of
                the run's own.

        Raises:
            UserError: A file that is missing or no image, an unknown key, or a wish that cannot be fulfilled.
        """
        if isinstance(pictures, str | Path | Image.Image):
            raise ValueError("wanted a list of pictures, found one; write [picture]")
        wish = self.wish(prefix=prefix, require=require, seed=seed, **search)
        views = [self.view(picture) for picture in pictures]
        return self.best(views, wish, range(len(views)))

    def wish(
        self, *, prefix: str = "", require: Sequence[str] = (), seed: int | None = None, **search: Any
    ) -> Wish:
        """Settle how captions are to be found; as `caption`."""
        settings = self.members.config
        changes = [f"search.{key}={json.dumps(value)}" for key, value in search.items() if value is not None]
        settings = toml.change(settings, changes, "search", option="")
        rules = make_rules(
            settings.search, self.vocabulary, settings.data.max_words, prefix=prefix, require=require
        )
        return Wish(settings.search, rules, settings.seed if seed is None else seed)

    def view(self, picture: Path | str | Image.Image) -> View:
        """Return what the model sees of a picture: its centre square."""
        if isinstance(picture, Image.Image):
            return self.centre(decode.upright(picture))
        return self.centre(decode.read(Path(picture)))

    def centre(self, picture: UInt8[np.ndarray, "height width 3"]) -> View:
        """Return what the model sees of a picture's pixels."""
        return centre_view(picture, self.members.config.data.image_size)

    def best(self, views: Sequence[View], wish: Wish, numbers: Sequence[int]) -> list[Gaze]:
        """Return the best caption of each of any number of pictures; as `write`."""
        size = wish.search.batch
        parts = (slice(first, first + size) for first in range(0, len(views), size))
        return [found[0] for part in parts for found in self.write(views[part], wish, numbers[part])]

    def write(
        self, views: Sequence[View], wish: Wish, numbers: Sequence[int], *, every: bool = False
    ) -> list[list[Gaze]]:
        """Return the captions of each of a batch of pictures, best first.

        Args:
            views: What the model sees of each.
            wish: How captions are to be found.
            numbers: Of each picture, of which and of the seed its sampled caption is a function.
            every: All that a beam search ends with, not the best alone.
        """
        features, decoder = features_of(self.captioner, views), self.captioner.decoder
        found = find_captions(
            decoder,
            features,
            wish.search,
            self.members.config.data.max_words,
            wish.rules,
            [(wish.seed, number) for number in numbers],
        )
        if not every:
            found = [captions[:1] for captions in found]
        owners = [picture for picture, captions in enumerate(found) for _ in captions]
        flat = [tokens for captions in found for tokens in captions]
        seen = (
            features[owners] if isinstance(features, torch.Tensor) else tuple(it[owners] for it in features)
        )
        gazes = iter(look_again(decoder, seen, flat, self.vocabulary))
        return [[next(gazes) for _ in captions] for captions in found]
