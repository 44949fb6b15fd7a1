"""Limits on the decoding work of an image file, checked before decoding.

Pixels alone do not bound it: a JPEG scan of ten bytes costs a pass over the image, and Pillow reads metadata
in Python. All limits are far above real files. The worst 20 MB file within them takes 3.3 s on one core: 88
megapixels of JPEG with 22 scans.
"""

import math
import re
import struct
from collections.abc import Callable

import numpy as np
from PIL import Image

_PNG = b"\x89PNG\r\n\x1a\n"
# Size of an image file: above the uncompressed size of the pixel limit.
MAX_IMAGE_BYTES = 512 << 20
# Segments or chunks that are not pixels. Pillow appends each to those before it.
_METADATA_PARTS = 1000
_METADATA_BYTES = 16 << 20
# Chunks of a PNG, and segments between the scans of a JPEG: libpng writes 8 KiB of pixels in each.
_CHUNKS = 100_000
# Blocks of at most 255 bytes before the first frame.
_GIF_BLOCKS = 10_000
# Values of a TIFF directory: its entries may all name the same bytes, and Pillow copies them for each.
_DIRECTORY_BYTES = 1 << 20
# Encoders write ten scans, or eighteen in CMYK. A pass takes 0.9 ns for each pixel, whatever the scan holds.
_SCANS = 500
_SCANNED_PIXELS = 2_000_000_000
# Pillow's decoder of run-length encoded BMPs is Python: 80 ns for each pixel, 300 ns for each pair of bytes.
_RLE_STEPS = 1 << 25

_MARKER = re.compile(rb"\xff[^\x00\xff]")
_SEGMENT_OR_END = re.compile(rb"\xff[\xc0-\xc7\xc9-\xcf\xd9-\xdd\xe0-\xef\xfe]")
_HUFFMAN_FRAMES = (0xC0, 0xC1, 0xC2)
_OTHER_FRAMES = (0xC3, *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))
_SCAN, _END = 0xDA, 0xD9
_RESTARTS = range(0xD0, 0xD8)
_SEGMENTS = (*_HUFFMAN_FRAMES, *_OTHER_FRAMES, 0xC4, 0xCC, *range(0xDB, 0xE0), *range(0xE0, 0xF0), 0xFE)
# Bytes of a value of each type of TIFF.
_UNITS = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}


def check_image(data: bytes) -> None:
    """Refuse an image file that takes too long to decode. Unknown formats pass, as no decoder reads them.

    Raises:
        ValueError: Too many scans or pixels, too much metadata, or an unsupported coding.
        Image.DecompressionBombError: Too many pixels, where Pillow would notice too late.
    """
    for signature, check in _CHECKS.items():
        if data.startswith(signature):
            check(data)


def check_tiff_directory(tiff: bytes) -> None:
    """Refuse a TIFF directory, such as EXIF, whose values take too much memory, by a ValueError."""
    while tiff.startswith(b"Exif\0\0"):
        tiff = tiff[6:]
    order = ">" if tiff.startswith(b"MM") else "<"
    # BigTIFF has the number 43. A value of at most the size of an offset takes its place.
    word, count_type, word_bytes = ("Q", "Q", 8) if len(tiff) > 2 and 43 in tiff[2:4] else ("I", "H", 4)
    entry = struct.Struct(f"{order}HH{word}{word}")
    total = 0
    try:
        (at,) = struct.unpack_from(order + word, tiff, word_bytes)
        (count,) = struct.unpack_from(order + count_type, tiff, at)
        first = at + struct.calcsize(order + count_type)
        for place in range(first, min(first + count * entry.size, len(tiff)), entry.size):
            _, kind, number, offset = entry.unpack_from(tiff, place)
            size = number * _UNITS.get(kind, 0)
            if size > word_bytes:
                if offset + size > len(tiff):
                    return  # Here Pillow stops too.
                total += size
            if total > _DIRECTORY_BYTES:
                raise ValueError(f"EXIF values of more than {_DIRECTORY_BYTES:,} bytes")
    except struct.error:
        return


def _check_jpeg(data: bytes) -> None:
    pixels, exif, index, at = 1, [], b"", 2
    metadata = _Metadata()
    while True:
        found = _MARKER.search(data, at)
        # Pillow passes over bytes between segments one by one.
        metadata.add(1 + (found.start() if found else len(data)) - at)
        if not found:
            return
        marker, at = data[found.end() - 1], found.end()
        if marker == _SCAN:
            break
        if marker in _RESTARTS:
            continue
        if marker not in _SEGMENTS:
            raise ValueError(f"JPEG marker 0x{marker:02x} before the pixels")
        if marker in _OTHER_FRAMES:
            raise ValueError("an arithmetic-coded, hierarchical or lossless JPEG")
        size = max(2, int.from_bytes(data[at : at + 2]))
        body = data[at + 2 : at + size]
        at += size
        metadata.add(0, size)
        if marker in _HUFFMAN_FRAMES:
            height, width = int.from_bytes(body[1:3]), int.from_bytes(body[3:5])
            # In whole blocks, as they are decoded.
            pixels = max(pixels, 64 * math.ceil(height / 8) * math.ceil(width / 8))
        elif marker == 0xE1 and body.startswith(b"Exif\0\0"):
            exif.append(body[6:])
        elif marker == 0xE2 and body.startswith(b"MPF\0"):
            index = body[4:]
    check_tiff_directory(b"".join(exif))
    check_tiff_directory(index)
    most = max(1, min(_SCANS, _SCANNED_PIXELS // pixels))
    # Metadata and what follows the image, such as a film, may hold these two bytes too.
    if _scan_markers(data) > most and _scans(data, found.start(), most) > most:
        raise ValueError(f"more than {most} scans, the most for an image of this size")


def _scan_markers(data: bytes) -> int:
    """Return an upper bound of the number of scans."""
    # `bytes.count` takes several times as long, 4 % of decoding.
    pairs = (np.frombuffer(data, "<u2", (len(data) - start) // 2, start) for start in (0, 1))
    return sum(int(np.count_nonzero(each == 0xDAFF)) for each in pairs)


def _scans(data: bytes, at: int, most: int) -> int:
    """Return the number of scans before the image ends, or any number above `most`."""
    count = 0
    for _ in range(_CHUNKS):
        found = _SEGMENT_OR_END.search(data, at)
        if not found or data[found.end() - 1] == _END or count > most:
            return count
        count += data[found.end() - 1] == _SCAN
        at = found.end() + max(2, int.from_bytes(data[found.end() : found.end() + 2]))
    raise ValueError(f"more than {_CHUNKS:,} segments")


def _check_png(data: bytes) -> None:
    at, metadata = len(_PNG), _Metadata()
    for _ in range(_CHUNKS):
        if at + 8 > len(data):
            return
        size, kind = struct.unpack_from(">I4s", data, at)
        at += 12 + size
        if kind == b"IEND":
            return
        if kind not in (b"IDAT", b"fdAT", b"fcTL"):
            metadata.add(1, size)
    raise ValueError(f"more than {_CHUNKS:,} chunks")


def _check_gif(data: bytes) -> None:
    def block(at: int) -> tuple[int, int]:
        size = data[at] if at < len(data) else 0
        return at + 1 + size, size

    at = 13 + (3 << 1 + (data[10] & 7) if len(data) > 10 and data[10] & 128 else 0)
    blocks = 0
    while at < len(data) and data[at] not in b",;":
        blocks += 1
        if data[at] != ord("!"):
            at += 1
        else:
            # Like Pillow, which continues after a first block that is empty, unless it is a comment's.
            label, netscape = data[at + 1 : at + 2], data.startswith(b"NETSCAPE2.0", at + 3)
            at, size = block(at + 2)
            if netscape and label == b"\xff":
                at, _ = block(at)
            while (size or label != b"\xfe") and blocks <= _GIF_BLOCKS:
                blocks += 1
                at, size = block(at)
                if not size:
                    break
        if blocks > _GIF_BLOCKS:
            raise ValueError(f"more than {_GIF_BLOCKS:,} blocks before the first frame")


def _check_bmp(data: bytes) -> None:
    if len(data) < 34:
        return
    header, width, height = struct.unpack_from("<Iii", data, 14)
    (compression,) = struct.unpack_from("<I", data, 30)
    if header > 12 and compression in (1, 2):
        # Two bytes can ask for 255 rows at once.
        steps = abs(width) * (abs(height) + 256) + 4 * len(data)
        if steps > _RLE_STEPS:
            raise ValueError("too large for a run-length encoded BMP")


def _check_webp(data: bytes) -> None:
    if data[12:16] == b"VP8X":
        width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
        # libwebp allocates memory for all pixels before Pillow reads the size.
        if width * height > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise Image.DecompressionBombError


_CHECKS: dict[bytes, Callable[[bytes], None]] = {
    b"\xff\xd8": _check_jpeg,
    _PNG: _check_png,
    b"GIF8": _check_gif,
    b"BM": _check_bmp,
    b"RIFF": _check_webp,
}


class _Metadata:
    """Counts metadata, and refuses too much."""

    def __init__(self) -> None:
        self._parts = self._bytes = 0

    def add(self, parts: int, size: int = 0) -> None:
        self._parts += parts
        self._bytes += size
        if self._parts > _METADATA_PARTS:
            raise ValueError(f"more than {_METADATA_PARTS:,} parts that are not pixels")
        if self._bytes > _METADATA_BYTES:
            raise ValueError(f"more than {_METADATA_BYTES:,} bytes of metadata")
