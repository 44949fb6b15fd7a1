"""What every reader of a data set gives: records, in the one order that shards have."""

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass

from captionscale.data.image_limits import MAX_IMAGE_BYTES

_SPLIT_ORDER = {"train": 0, "val": 1, "test": 2}


@dataclass(frozen=True, slots=True)
class Record:
    """One image of a data set with all its captions.

    Attributes:
        image_id: The data set's own number of the image.
        split: The part of the data set: train, val, test, or another name that the caller gave.
        captions: Raw texts in the data set's order, without surrounding white space; none where the
            data set has none, as for a leaderboard's test images.
        source: The folder of the image file, or the tar that holds it.
        name: Its file name in there.
        offset: Where the image starts in the tar, in bytes; 0 for a file of its own.
        size: Its size in the tar, in bytes; None for a file of its own.
    """

    image_id: int
    split: str
    captions: tuple[str, ...]
    source: str
    name: str
    offset: int = 0
    size: int | None = None

    @property
    def place(self) -> str:
        """Where the image is, for errors."""
        return self.file if self.size is None else f"{self.file}: {self.name}"

    def read(self) -> bytes:
        """Return the image's bytes.

        Raises:
            OSError: There is no such file, or it cannot be read.
            EOFError: The tar ends before the image does, it is larger than any image, or there is no
                regular file.
        """
        # A named pipe would wait for a writer for ever.
        descriptor = os.open(self.file, os.O_RDONLY | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise EOFError("no regular file")
            size = status.st_size if self.size is None else self.size
            if size > MAX_IMAGE_BYTES:
                raise EOFError(f"{size:,} bytes, expected at most {MAX_IMAGE_BYTES:,}")
            data = os.pread(descriptor, size, self.offset)
        finally:
            os.close(descriptor)
        if len(data) != size:
            raise EOFError(f"ends after {len(data):,} of {size:,} bytes")
        return data

    @property
    def file(self) -> str:
        """The file that holds the image: its own, or the tar."""
        return f"{self.source}/{self.name}" if self.size is None else self.source


def sort_records(records: Iterable[Record]) -> list[Record]:
    """Return records as shards hold them: by split (train, val, test, others) and image id."""
    return sorted(records, key=lambda it: (_SPLIT_ORDER.get(it.split, 3), it.split, it.image_id))
