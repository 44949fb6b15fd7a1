"""Batches from items: read, decode, augment, tokenize.

The loader is stateless: a batch depends only on its items and the epoch.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float16, Int, UInt8
from torch import Tensor

from captionscale.config import Data
from captionscale.config_model import Interpolation
from captionscale.data import decode, transforms
from captionscale.data.feature_cache import FeatureReader
from captionscale.data.shards import Split
from captionscale.vocab import PAD, Vocabulary

Items = Int[np.ndarray, "item"]
View = UInt8[np.ndarray, "size size 3"] | Float16[np.ndarray, "region feature"]
Views = UInt8[np.ndarray, "image size size 3"] | Float16[np.ndarray, "image region feature"]
ImageBatch = UInt8[Tensor, "image 3 size size"] | Float16[Tensor, "image region feature"]
Captions = list[list[int]]
_Work = tuple[Items, ImageBatch, list[Future[list[Captions]]]]


@dataclass(frozen=True)
class Batch:
    """Images with all their captions.

    Attributes:
        images: Pixels, channels last in memory, or cached encoder features.
        tokens: START, words, END, then PAD.
        image_index: Row of `images` of each caption.
        image_ids: Image ids of the data set.
        lengths: Number of input tokens of each caption, all but its last, on the host; by default from
            `tokens`.
    """

    images: ImageBatch
    tokens: Int[Tensor, "caption time"]
    image_index: Int[Tensor, "caption"]
    image_ids: list[int]
    lengths: Sequence[int] = ()

    def __post_init__(self) -> None:
        if len(self.lengths) != len(self.tokens):
            object.__setattr__(self, "lengths", input_lengths(self.tokens))

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device."""
        # Copies from pinned memory are asynchronous.
        images = self.images.to(device, non_blocking=self.images.is_pinned())
        tokens, image_index = self.tokens.to(device), self.image_index.to(device)
        return replace(self, images=images, tokens=tokens, image_index=image_index)


def input_lengths(tokens: Int[Tensor, "caption time"]) -> list[int]:
    """Return the number of input tokens of each caption: all but the last."""
    return (tokens[:, 1:] != PAD).sum(1).tolist()


class Loader:
    """Batches of one split."""

    def __init__(
        self,
        split: Split,
        vocabulary: Vocabulary,
        data: Data,
        seed: int = 0,
        features: FeatureReader | None = None,
        interpolation: Interpolation = "bilinear",
    ):
        """Create a loader with `data.workers` threads.

        The seed is that of the augmentation. Cached features of the split replace pixels. The encoder
        declares the interpolation.
        """
        self.split, self.vocabulary, self.features = split, vocabulary, features
        self.data, self.seed, self.interpolation = data, seed, interpolation
        # Worker threads run torch on one core each. torch passes a thread's setting on to threads that start
        # later, but not to this one once it has asked for its number.
        torch.get_num_threads()
        self._pool = ThreadPoolExecutor(data.workers, "decode", torch.set_num_threads, (1,))

    def prefetch(
        self, requests: Iterable[tuple[Int[np.ndarray, "_"], int | None]], depth: int = 3
    ) -> Iterator[Batch]:
        """Yield the batch of each request, while the next `depth` ones are decoded.

        A request is rows of the split's index, and the training epoch, which seeds the augmentation, or None
        for center crops. A damaged shard is a UserError.
        """
        waiting: deque[_Work] = deque()
        for items, epoch in requests:
            waiting.append(self._submit(items, epoch))
            if len(waiting) > depth:
                yield self._collate(*waiting.popleft())
        while waiting:
            yield self._collate(*waiting.popleft())

    def close(self) -> None:
        """Stop the threads; pending work is canceled."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _submit(self, items: Items, epoch: int | None) -> _Work:
        size = self.data.image_size
        shape: tuple[int, ...] = (size, size, 3)
        if self.features is not None:
            shape = self.features.shape
        dtype = torch.uint8 if self.features is None else torch.float16
        # Pinned once a GPU is in use.
        pinned: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        images = torch.empty((len(items), *shape), dtype=dtype, pin_memory=pinned)
        rows = images.numpy()
        # One task per thread: submitting single images costs a tenth of their decoding.
        count = max(1, -(-len(items) // self.data.workers))
        parts = [slice(start, start + count) for start in range(0, len(items), count)]
        work = [self._pool.submit(self._fill, rows[part], items[part], epoch) for part in parts]
        return items, images if self.features is not None else images.permute(0, 3, 1, 2), work

    def _fill(self, rows: Views, items: Items, epoch: int | None) -> list[Captions]:
        """Write images into `rows`, and return their tokenized captions."""
        captions, words = [], self.data.max_words
        for row, item in zip(rows, items.tolist(), strict=True):
            row[...] = self._view(item, epoch)
            captions.append([self.vocabulary.encode(caption, words) for caption in self.split.captions(item)])
        return captions

    def _view(self, item: int, epoch: int | None) -> View:
        if self.features is not None:
            return self.features[item]
        data = self.data
        place = f"{self.split.storage}: image {self.split.index[item]['image_id']}"
        image = decode.decode_image(self.split.image(item), place)
        if epoch is None:
            return transforms.center_crop(image, data.image_size, self.interpolation)
        return transforms.augment(
            image,
            data.image_size,
            crop_scale=data.crop_scale,
            flip=data.flip,
            color_jitter=data.color_jitter,
            rotate=data.rotate,
            interpolation=self.interpolation,
            random=np.random.default_rng([self.seed, epoch, item]),
        )

    def _collate(self, items: Items, images: ImageBatch, work: list[Future[list[Captions]]]) -> Batch:
        samples = [captions for part in work for captions in part.result()]
        captions = [caption for sample in samples for caption in sample]
        tokens = np.full((len(captions), max(map(len, captions), default=0)), PAD)
        for row, caption in zip(tokens, captions, strict=True):
            row[: len(caption)] = caption
        image_index = np.repeat(np.arange(len(samples)), [len(sample) for sample in samples])
        image_ids = self.split.index["image_id"][items].tolist()
        lengths = [len(caption) - 1 for caption in captions]
        return Batch(images, torch.from_numpy(tokens), torch.from_numpy(image_index), image_ids, lengths)
