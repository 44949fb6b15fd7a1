"""From items to batches: read by offset, decode, augment, number the words.

The loader holds no position and no random state: a batch is a function of its items and the epoch.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float16, Int, UInt8
from torch import Tensor

from captionscale.config import Data
from captionscale.data import images
from captionscale.data.features import Cache
from captionscale.data.shards import Split
from captionscale.vocab import PAD, Vocabulary

Items = Int[np.ndarray, "item"]
View = UInt8[np.ndarray, "3 size size"] | Float16[np.ndarray, "region feature"]
Sample = tuple[View, list[list[int]]]


@dataclass(frozen=True)
class Batch:
    """Pictures and all captions of each of them."""

    images: UInt8[Tensor, "image 3 size size"] | Float16[Tensor, "image region feature"]
    """As pixels, or as the features that an encoder has made of them."""
    tokens: Int[Tensor, "caption time"]
    """Start, words, end, then padding."""
    owners: Int[Tensor, "caption"]
    """The row of `images` that each caption belongs to."""
    image_ids: list[int]
    """The data set's."""

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device."""
        images, tokens, owners = (tensor.to(device) for tensor in (self.images, self.tokens, self.owners))
        return Batch(images, tokens, owners, self.image_ids)


class Loader:
    """Batches of one split."""

    def __init__(
        self,
        split: Split,
        vocabulary: Vocabulary,
        data: Data,
        seed: int = 0,
        features: Cache | None = None,
    ):
        """Take what batches are made of.

        Args:
            split: Whose images and captions they hold.
            vocabulary: Numbers the words.
            data: The config's section.
            seed: Of the augmentation.
            features: Of all images of the split: batches then hold these, and no image is decoded.
        """
        self.features = features
        self.split = split
        self.vocabulary = vocabulary
        self.data = data
        self.seed = seed
        self._pool = ThreadPoolExecutor(data.workers, thread_name_prefix="decode")

    def ahead(
        self, requests: Iterable[tuple[Int[np.ndarray, "_"], int | None]], depth: int = 3
    ) -> Iterator[Batch]:
        """Yield the batch of each request, decoding the next ones meanwhile.

        Args:
            requests: Rows of the split's index, and the epoch of training, which keys the augmentation; no
                epoch: the centre of each picture.
            depth: Batches decoded ahead of the one in use.

        Raises:
            UserError: A damaged shard.
        """
        waiting: deque[tuple[Items, list[Future[Sample]]]] = deque()
        for items, epoch in requests:
            waiting.append((items, self._submit(items, epoch)))
            if len(waiting) > depth:
                yield self._collate(*waiting.popleft())
        while waiting:
            yield self._collate(*waiting.popleft())

    def close(self) -> None:
        """Let go of the threads, without waiting for what they were asked."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _submit(self, items: Items, epoch: int | None) -> list[Future[Sample]]:
        return [self._pool.submit(self._sample, int(item), epoch) for item in items]

    def _sample(self, item: int, epoch: int | None) -> Sample:
        captions = self.split.captions(item)
        return self._view(item, epoch), [
            self.vocabulary.encode(caption, self.data.max_words) for caption in captions
        ]

    def _view(self, item: int, epoch: int | None) -> View:
        if self.features is not None:
            return self.features[item]
        data = self.data
        place = f"{self.split.place}: image {self.split.index[item]['image_id']}"
        picture = images.decode(self.split.image(item), place)
        if epoch is None:
            return images.centre_view(picture, data.image_size)
        return images.random_view(
            picture,
            data.image_size,
            crop_scale=data.crop_scale,
            flip=data.flip,
            colour_jitter=data.colour_jitter,
            rotate=data.rotate,
            random=np.random.default_rng([self.seed, epoch, item]),
        )

    def _collate(self, items: Items, samples: list[Future[Sample]]) -> Batch:
        views, captions = zip(*(sample.result() for sample in samples), strict=True)
        rows = [tokens for each in captions for tokens in each]
        tokens = np.full((len(rows), max(map(len, rows), default=0)), PAD)
        for row, caption in zip(tokens, rows, strict=True):
            row[: len(caption)] = caption
        owners = np.repeat(np.arange(len(captions)), [len(each) for each in captions])
        image_ids = self.split.index["image_id"][items].tolist()
        return Batch(
            torch.from_numpy(np.stack(views)), torch.from_numpy(tokens), torch.from_numpy(owners), image_ids
        )
