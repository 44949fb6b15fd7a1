"""From items to batches: read by offset, decode, augment, number the words.

The loader holds no position and no random state: a batch is a function of its items and the epoch.
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
    """Pictures and all captions of each of them."""

    images: ImageBatch
    """As pixels, channels last in memory; or as the features that an encoder has made of them."""
    tokens: Int[Tensor, "caption time"]
    """Start, words, end, then padding."""
    image_index: Int[Tensor, "caption"]
    """The row of `images` that each caption belongs to."""
    image_ids: list[int]
    """The data set's."""
    lengths: Sequence[int] = ()
    """Number of tokens to read of each caption, all but its last, for the host; by default from `tokens`."""

    def __post_init__(self) -> None:
        """Count tokens where nobody has."""
        if len(self.lengths) != len(self.tokens):
            object.__setattr__(self, "lengths", input_lengths(self.tokens))

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device."""
        # Pinned memory is copied while this thread goes on.
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
        # Each thread does one picture: torch's own threads would fight with these for the cores. What one
        # sets for itself, torch also gives to threads to come, but not to one that has asked for its number.
        torch.get_num_threads()
        self._pool = ThreadPoolExecutor(data.workers, "decode", torch.set_num_threads, (1,))

    def prefetch(
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
        waiting: deque[_Work] = deque()
        for items, epoch in requests:
            waiting.append(self._submit(items, epoch))
            if len(waiting) > depth:
                yield self._collate(*waiting.popleft())
        while waiting:
            yield self._collate(*waiting.popleft())

    def close(self) -> None:
        """Let go of the threads, without waiting for what they were asked."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _submit(self, items: Items, epoch: int | None) -> _Work:
        pictures = self._room(len(items))
        # The threads' own views of it, as wide as what they put there.
        rows = pictures.numpy() if self.features is not None else pictures.permute(0, 2, 3, 1).numpy()
        # One piece of work for each thread: to hand over a single picture takes a tenth of its decoding.
        some = max(1, -(-len(items) // self.data.workers))
        pieces = [slice(start, start + some) for start in range(0, len(items), some)]
        work = [self._pool.submit(self._fill, rows[piece], items[piece], epoch) for piece in pieces]
        return items, pictures, work

    def _room(self, count: int) -> ImageBatch:
        """Return the memory of a batch's pictures, which is yet to be filled."""
        # Once a GPU is in use: torch keeps pinned memory, and gives it out again when it was copied.
        pinned: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        if self.features is not None:
            return torch.empty((count, *self.features.shape), dtype=torch.float16, pin_memory=pinned)
        size = self.data.image_size
        pixels = torch.empty((count, size, size, 3), dtype=torch.uint8, pin_memory=pinned)
        return pixels.permute(0, 3, 1, 2)

    def _fill(self, rows: Views, items: Items, epoch: int | None) -> list[Captions]:
        """Put items' pictures into their rows, and return their captions."""
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
        picture = decode.decode_image(self.split.image(item), place)
        if epoch is None:
            return transforms.center_crop(picture, data.image_size)
        return transforms.augment(
            picture,
            data.image_size,
            crop_scale=data.crop_scale,
            flip=data.flip,
            color_jitter=data.color_jitter,
            rotate=data.rotate,
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
