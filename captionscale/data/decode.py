"""From stored bytes to upright pixels."""

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
from captionscale.files import UnfitFileError, read_file

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")

# The filters are the whole process's: a thread that set them for itself would put back another's.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

# What libjpeg says of missing or broken pixels; all else that it warns of (bytes too many between segments,
# an unknown revision of JFIF, an odd ICC profile) harms no picture.
_DAMAGE = re.compile(r"premature end|bad \w+ code|instead of RST", re.IGNORECASE)
_TILE_PIXELS = 1 << 20
# A JPEG segment before the pixels other than APP1, which holds EXIF and XMP and so the orientation.
_SEGMENT = re.compile(rb"\xff[\xc0-\xcf\xdb-\xe0\xe2-\xfe]")


class ImageInfo(NamedTuple):
    """What an image file is.

    Attributes:
        width: In pixels, of the upright picture.
        height: In pixels, of the upright picture.
        extension: The file name extension that a WebDataset reader decodes these bytes by, such as `jpg`.
    """

    width: int
    height: int
    extension: str


def decode_image(data: bytes, place: str) -> UInt8[np.ndarray, "height width 3"]:
    """Return RGB pixels, turned the way up that the EXIF orientation says, on white where transparent.

    simplejpeg decodes what is an ordinary JPEG, Pillow all else; on JPEGs both give the same pixels.

    Args:
        data: A JPEG, PNG, WebP, BMP or GIF file; of several frames the first is taken.
        place: Where the bytes are from, for the error.

    Raises:
        UserError: No such file, a damaged one, or one of absurdly many pixels.
    """
    with _refusing(data, place):
        header = _jpeg_header(data)
        if header and (image := _jpeg(data)) is not None:
            return _upright(image, header[2])
        return _by_pillow(data)


def read_image(file: Path) -> UInt8[np.ndarray, "height width 3"]:
    """Return the `decode_image` of an image file.

    Raises:
        UserError: It is missing; as `decode_image` does.
    """
    if not file.is_file():
        found = "a folder" if file.is_dir() else "no such file"
        raise UserError(f"{file}: {found}, wanted an image, such as a JPEG; correct the path")
    try:
        data = read_file(file, image_limits.MAX_IMAGE_BYTES)
    except UnfitFileError as error:
        raise UserError(f"{file}: {error.strerror}, wanted an image; correct the path") from None
    return decode_image(data, str(file))


def decode_pil(data: bytes, place: str) -> Image.Image:
    """Return `decode_image` as a picture of Pillow's."""
    return Image.fromarray(decode_image(data, place))


def pil_to_rgb(picture: Image.Image) -> UInt8[np.ndarray, "height width 3"]:
    """Return the pixels of a picture of Pillow's, as `decode_image` does of a file.

    Raises:
        UserError: As `decode_image` does, if Pillow has opened a file but not decoded it yet.
    """
    file = picture.fp if isinstance(picture, ImageFile.ImageFile) else None
    if file is None or file.closed:
        return _uprighted(picture)
    at = file.tell()
    file.seek(0)
    data = file.read()
    file.seek(at)
    with _refusing(data, getattr(picture, "filename", "") or "image"):
        return _uprighted(picture)


def _uprighted(picture: Image.Image) -> UInt8[np.ndarray, "height width 3"]:
    picture.load()
    width, height = picture.size
    image = np.empty((height, width, 3), np.uint8)
    # By tiles, as the steps to RGB need up to twenty bytes for each pixel.
    columns = min(width, _TILE_PIXELS)
    rows = max(1, _TILE_PIXELS // columns)
    for top in range(0, height, rows):
        for left in range(0, width, columns):
            bottom, right = min(height, top + rows), min(width, left + columns)
            tile = picture.crop((left, top, right, bottom))
            image[top:bottom, left:right] = np.asarray(_rgb(tile))
    return _upright(image, _orientation(picture))


def image_info(data: bytes, place: str, *, full_decode: bool) -> ImageInfo:
    """Return what an image file is, at the least cost.

    Args:
        data: A JPEG, PNG, WebP, BMP or GIF file.
        place: Where the bytes are from, for the error.
        full_decode: Prove that `decode_image` can decode it; otherwise read only what gives the size.

    Raises:
        UserError: As `decode_image` does.
    """
    with _refusing(data, place):
        header = _jpeg_header(data)
        # At an eighth of the size, libjpeg still reads every code of the file.
        if header and not (full_decode and _jpeg(data, eighth=True) is None):
            height, width, orientation = header
            extension = "jpg"
        else:
            with _open(data) as picture:
                if full_decode:
                    picture.load()
                (width, height), orientation = picture.size, _orientation(picture)
                kind = str(picture.format)
            # MPO, of phones with two lenses, is a JPEG with more behind it.
            extension = "jpg" if kind in ("JPEG", "MPO") else kind.lower()
        return (
            ImageInfo(height, width, extension) if orientation >= 5 else ImageInfo(width, height, extension)
        )


def count_pixels(data: bytes, place: str) -> int:
    """Return the number of pixels that an image file's header states. Nothing is decoded.

    Unlike `image_info`, which decodes a PNG to find an orientation after its pixels.

    Raises:
        UserError: As `decode_image` does, for what its header and the limits tell.
    """
    with _refusing(data, place), _open(data) as picture:
        return picture.width * picture.height


@contextmanager
def _refusing(data: bytes, place: str) -> Iterator[None]:
    """Hold an image file to the limits, then turn what its decoder raises into an error with its place."""
    try:
        image_limits.check_image(data)
        yield
    except MemoryError:
        raise  # The machine's fault, not the image's.
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise UserError(
            f"{place}: more than {Image.MAX_IMAGE_PIXELS:,} pixels, wanted at most so many; make it smaller"
        ) from None
    # Pillow's decoders raise nearly anything on damaged bytes; all of it means the same to a user.
    except Exception as error:
        reason = str(error).split("<_io")[0].strip() or type(error).__name__
        raise UserError(
            f"{place}: not a readable image ({reason}), {len(data):,} bytes;"
            f" wanted {', '.join(FORMATS)}; repair or remove it"
        ) from None


def _jpeg_header(data: bytes) -> tuple[int, int, int] | None:
    """Return stored height, width and orientation of a JPEG that simplejpeg may decode, else nothing."""
    if not data.startswith(b"\xff\xd8"):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except ValueError:
        return None
    # Pillow knows the colours of print, and has the words for a decompression bomb.
    if colours not in ("YCbCr", "RGB", "Gray") or height * width > (Image.MAX_IMAGE_PIXELS or math.inf):
        return None
    at = 2
    while _SEGMENT.match(data, at):
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    if data[at : at + 2] == b"\xff\xda":
        return height, width, 1
    with _open(data) as picture:
        return height, width, _orientation(picture)


def _jpeg(data: bytes, *, eighth: bool = False) -> UInt8[np.ndarray, "height width 3"] | None:
    """Return a JPEG's pixels as stored; nothing where libjpeg warns of what may be harmless.

    Pillow judges that: libjpeg tells only its first warning, and Pillow notices that a file ends too soon.
    """
    least = int(eighth)
    image: UInt8[np.ndarray, "height width 3"]
    try:
        image = simplejpeg.decode_jpeg(data, min_height=least, min_width=least, strict=True)
    except ValueError as error:
        if _DAMAGE.search(str(error)):
            raise
        return None
    return image


def _by_pillow(data: bytes) -> UInt8[np.ndarray, "height width 3"]:
    with _open(data) as picture:
        return _uprighted(picture)


def _open(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=FORMATS)


def _orientation(picture: Image.Image) -> int:
    """Return 1 to 8 as EXIF numbers them; 1, upright, if it says nothing that can be read."""
    found: Any = None
    # Damaged EXIF makes Pillow raise this and that, and no picture worse.
    with suppress(Exception):
        info = picture.info
        raw = bytes.fromhex("".join(info.get("Raw profile type exif", "").split("\n")[3:]))
        image_limits.check_tiff_directory(info.get("exif", raw))
        found = picture.getexif().get(ExifTags.Base.Orientation)
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
    """Return a picture in RGB, on white where it is transparent."""
    if image.mode.startswith("I"):
        # Greys of 16 bits, which Pillow would cut off at 255 where they have to be scaled.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
