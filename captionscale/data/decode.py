"""Decode stored image bytes to upright pixels."""

import io
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageFile

from captionscale.data import image_limits
from captionscale.errors import UserError
from captionscale.files import read_file

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")

# Warning filters are global to the process: set once, not by each thread.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

# libjpeg's warnings of missing or broken pixels. Its other warnings (extra bytes between segments, an unknown
# JFIF revision, an odd ICC profile) are harmless.
_DAMAGE = re.compile(r"premature end|bad \w+ code|instead of RST", re.IGNORECASE)
_TILE_PIXELS = 1 << 20
# A JPEG segment before the pixels other than APP1, which holds EXIF and XMP and so the orientation.
_SEGMENT = re.compile(rb"\xff[\xc0-\xcf\xdb-\xe0\xe2-\xfe]")


class ImageInfo(NamedTuple):
    """Upright size of an image in pixels, and the extension by which a WebDataset reader decodes its file."""

    width: int
    height: int
    extension: str


def decode_image(data: bytes, place: str) -> UInt8[np.ndarray, "height width 3"]:
    """Return RGB pixels of the first frame, upright by the EXIF orientation, on white where transparent.

    simplejpeg decodes ordinary JPEGs, Pillow the rest; on JPEGs both give the same pixels.

    Raises:
        UserError: The image is damaged or beyond the limits; the message starts with `place`.
    """
    with _check(data, place):
        header = _jpeg_header(data)
        if header and (image := _jpeg(data)) is not None:
            return _upright(image, header[2])
        with _open(data) as pil:
            return _pixels(pil)


def read_image(file: Path) -> UInt8[np.ndarray, "height width 3"]:
    """Read and decode an image file."""
    try:
        data = read_file(file, image_limits.MAX_IMAGE_BYTES)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}, expected an image file; correct the path") from None
    return decode_image(data, str(file))


def pil_to_rgb(pil: Image.Image) -> UInt8[np.ndarray, "height width 3"]:
    """Return the pixels of a Pillow image, as `decode_image` does for a file."""
    file = pil.fp if isinstance(pil, ImageFile.ImageFile) else None
    if file is None or file.closed:
        return _pixels(pil)
    at = file.tell()
    file.seek(0)
    data = file.read()
    file.seek(at)
    with _check(data, getattr(pil, "filename", "") or "image"):
        return _pixels(pil)


def image_info(data: bytes, place: str, *, full_decode: bool) -> ImageInfo:
    """Return size and format of an image file, from its header, or after a test of `decode_image`."""
    with _check(data, place):
        header = _jpeg_header(data)
        # At an eighth of the size, libjpeg still reads every code of the file.
        if header and not (full_decode and _jpeg(data, eighth=True) is None):
            (height, width, orientation), kind = header, "jpg"
        else:
            with _open(data) as pil:
                if full_decode:
                    pil.load()
                (width, height), orientation = pil.size, _orientation(pil)
                # MPO, of phones with two lenses, is a JPEG with more behind it.
                kind = "jpg" if pil.format in ("JPEG", "MPO") else str(pil.format).lower()
        return ImageInfo(height, width, kind) if orientation >= 5 else ImageInfo(width, height, kind)


def count_pixels(data: bytes, place: str) -> int:
    """Return the number of pixels in an image file's header, without decoding."""
    with _check(data, place), _open(data) as pil:
        return pil.width * pil.height


@contextmanager
def _check(data: bytes, place: str) -> Iterator[None]:
    """Check the limits, and turn decoder errors into user errors."""
    try:
        image_limits.check_image(data)
        yield
    except MemoryError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise UserError(
            f"{place}: more than {Image.MAX_IMAGE_PIXELS:,} pixels, the most expected; resize the image"
        ) from None
    # On damaged bytes, Pillow's decoders raise nearly any exception.
    except Exception as error:
        reason = str(error).split("<_io")[0].strip() or type(error).__name__
        raise UserError(
            f"{place}: not a readable image ({reason}), {len(data):,} bytes;"
            f" expected {', '.join(FORMATS)}; repair or remove it"
        ) from None


def _jpeg_header(data: bytes) -> tuple[int, int, int] | None:
    """Return stored height, width and orientation if simplejpeg can decode this JPEG."""
    if not data.startswith(b"\xff\xd8"):
        return None
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except ValueError:
        return None
    # Pillow converts CMYK, and reports decompression bombs.
    if colors not in ("YCbCr", "RGB", "Gray") or height * width > (Image.MAX_IMAGE_PIXELS or math.inf):
        return None
    at = 2
    while _SEGMENT.match(data, at):
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    if data[at : at + 2] == b"\xff\xda":
        return height, width, 1
    with _open(data) as pil:
        return height, width, _orientation(pil)


def _jpeg(data: bytes, *, eighth: bool = False) -> UInt8[np.ndarray, "height width 3"] | None:
    """Return a JPEG's pixels as stored, or None if Pillow has to judge whether a warning is harmless."""
    # libjpeg reports only its first warning; Pillow notices truncation.
    side = int(eighth)
    image: UInt8[np.ndarray, "height width 3"] | None = None
    try:
        image = simplejpeg.decode_jpeg(data, min_height=side, min_width=side, strict=True)
    except ValueError as error:
        if _DAMAGE.search(str(error)):
            raise
    return image


def _open(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=FORMATS)


def _pixels(pil: Image.Image) -> UInt8[np.ndarray, "height width 3"]:
    pil.load()
    width, height = pil.size
    image = np.empty((height, width, 3), np.uint8)
    # In tiles: conversion to RGB takes up to twenty bytes a pixel.
    columns = min(width, _TILE_PIXELS)
    rows = max(1, _TILE_PIXELS // columns)
    for top in range(0, height, rows):
        for left in range(0, width, columns):
            bottom, right = min(height, top + rows), min(width, left + columns)
            tile = pil.crop((left, top, right, bottom))
            image[top:bottom, left:right] = np.asarray(_rgb(tile))
    return _upright(image, _orientation(pil))


def _orientation(pil: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 (upright) if it cannot be read."""
    found: Any = None
    # Damaged EXIF raises nearly any exception; the pixels are still good.
    with suppress(Exception):
        raw = bytes.fromhex("".join(pil.info.get("Raw profile type exif", "").split("\n")[3:]))
        image_limits.check_tiff_directory(pil.info.get("exif", raw))
        found = pil.getexif().get(ExifTags.Base.Orientation)
    return int(found) if found in range(1, 9) else 1


def _upright(
    image: UInt8[np.ndarray, "stored_height stored_width 3"], orientation: int
) -> UInt8[np.ndarray, "height width 3"]:
    if orientation >= 5:
        image = image.swapaxes(0, 1)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return np.ascontiguousarray(image[::rows, ::columns])


def _rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB, on white where transparent."""
    if image.mode.startswith("I"):
        # Pillow would clip 16-bit grays at 255 instead of scaling.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
