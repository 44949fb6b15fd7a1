"""Batches from items: read, decode, augment, tokenize.

The loader is stateless: a batch depends only on its items and the epoch.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

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
    """Images with all their captions."""

    images: ImageBatch
    """Pixels, channels last in memory, or cached encoder features."""
    tokens: Int[Tensor, "caption time"]
    """START, words, END, then PAD."""
    image_index: Int[Tensor, "caption"]
    """Row of `images` of each caption."""
    image_ids: list[int]
    """Image ids of the data set."""
    lengths: Sequence[int] = ()
    """Number of tokens to read of each caption, all but its last, for the host; by default from `tokens`."""

    def __post_init__(self) -> None:
        """Count tokens where nobody has."""
        if len(self.lengths) != len(self.tokens):
            object.__setattr__(self, "lengths", input_lengths(self.tokens))

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device."""
        # Copies from pinned memory are asynchronous.
        images = self.images.to(device, non_blocking=self.images.is_pinned())
        return Batch(
            images, self.tokens.to(device), self.image_index.to(device), self.image_ids, self.lengths
        )


def input_lengths(tokens: Int[Tensor, "caption time"]) -> list[int]:
    """Return the number of tokens to read of each caption: all but the last."""
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

        Args:
            split: Images and captions.
            vocabulary: Token ids.
            data: The config's section `data`.
            seed: Seed of the augmentation.
            features: Cached features of all images of the split, used instead of pixels.
            interpolation: How images are resized, as the encoder declares it.
        """
        self.features = features
        self.split = split
        self.vocabulary = vocabulary
        self.data = data
        self.seed = seed
        self.interpolation = interpolation
        # Worker threads run torch on one core each. torch passes a thread's setting on to threads that start
        # later, but not to this one once it has asked for its number.
        torch.get_num_threads()
        self._pool = ThreadPoolExecutor(data.workers, "decode", torch.set_num_threads, (1,))

    def prefetch(
        self, requests: Iterable[tuple[Int[np.ndarray, "_"], int | None]], depth: int = 3
    ) -> Iterator[Batch]:
        """Yield the batch of each request, while the next ones are decoded.

        Args:
            requests: Rows of the split's index, and the training epoch, which seeds the augmentation; None
                takes center crops.
            depth: Batches to decode ahead.

        Raises:
            UserError: A damaged shard.
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
        images = self._empty(len(items))
        rows = images.numpy() if self.features is not None else images.permute(0, 2, 3, 1).numpy()
        # One task per thread: submitting single images costs a tenth of their decoding.
        some = max(1, -(-len(items) // self.data.workers))
        pieces = [slice(start, start + some) for start in range(0, len(items), some)]
        work = [self._pool.submit(self._fill, rows[piece], items[piece], epoch) for piece in pieces]
        return items, images, work

    def _empty(self, count: int) -> ImageBatch:
        """Return memory for a batch; pinned once a GPU is in use."""
        pinned: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        if self.features is not None:
            return torch.empty((count, *self.features.shape), dtype=torch.float16, pin_memory=pinned)
        size = self.data.image_size
        pixels = torch.empty((count, size, size, 3), dtype=torch.uint8, pin_memory=pinned)
        return pixels.permute(0, 3, 1, 2)

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

    def _collate(self, items: Items, pictures: ImageBatch, work: list[Future[list[Captions]]]) -> Batch:
        captions = [sample for piece in work for sample in piece.result()]
        rows = [tokens for each in captions for tokens in each]
        tokens = np.full((len(rows), max(map(len, rows), default=0)), PAD)
        for row, caption in zip(tokens, rows, strict=True):
            row[: len(caption)] = caption
        image_index = np.repeat(np.arange(len(captions)), [len(each) for each in captions])
        image_ids = self.split.index["image_id"][items].tolist()
        return Batch(
            pictures,
            torch.from_numpy(tokens),
            torch.from_numpy(image_index),
            image_ids,
            [len(row) - 1 for row in rows],
        )
