"""Records: the images of a data set with their captions."""

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
        image_id: Image id of the data set.
        split: Split of the data set: train, val, test, or another name.
        captions: Raw captions in order, stripped; none for images to be captioned only.
        source: Folder of the image file, or the tar that contains it.
        name: File name in the folder or tar.
        offset: Offset in the tar, in bytes; 0 for an image file.
        size: Size in the tar, in bytes; None for an image file.
    """

    image_id: int
    split: str
    captions: tuple[str, ...]
    source: str
    name: str
    offset: int = 0
    size: int | None = None

    @property
    def file(self) -> str:
        """The image file, or the tar that contains it."""
        return f"{self.source}/{self.name}" if self.size is None else self.source

    @property
    def place(self) -> str:
        """Location of the image, for errors."""
        return self.file if self.size is None else f"{self.file}: {self.name}"

    def read(self) -> bytes:
        """Return the image's bytes.

        Raises:
            OSError: The file is missing, or cannot be read.
            EOFError: It is truncated, too large, or not a regular file.
        """
        # Without O_NONBLOCK, a named pipe would block. `open_file` takes three times as long.
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


def sort_records(records: Iterable[Record]) -> list[Record]:
    """Sort records as in shards: by split (train, val, test, others) and image id."""
    return sorted(records, key=lambda it: (_SPLIT_ORDER.get(it.split, 3), it.split, it.image_id))
