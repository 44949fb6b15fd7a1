"""From stored bytes to the square picture that the encoder sees."""

import io
import math
import warnings
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance, ImageOps

from captionscale.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")

# The filters are the whole process's: a thread that set them for itself would put back another's.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


def decode(data: bytes, place: str) -> Image.Image:
    """Return an RGB picture, turned the way up that its EXIF orientation says.

    Args:
        data: A JPEG, PNG, WebP, BMP or GIF file.
        place: Where the bytes are from, for the error.

    Raises:
        UserError: No such file, a damaged one, or one of absurdly many pixels.
    """
    try:
        with _open(data) as image:
            return _rgb(ImageOps.exif_transpose(image))
    # Pillow's decoders raise nearly anything on damaged bytes; all of it means the same to a user.
    except Exception as error:
        reason = str(error).split("<_io")[0].strip() or type(error).__name__
        raise UserError(
            f"{place}: not a readable image ({reason}), {len(data):,} bytes;"
            f" wanted {', '.join(FORMATS)}; repair or remove it"
        ) from None


def extension(data: bytes) -> str:
    """Return the file name extension that a WebDataset reader decodes these image bytes by."""
    with _open(data) as image:
        # MPO, of phones with two lenses, is a JPEG with more behind it.
        return {"JPEG": "jpg", "MPO": "jpg"}.get(str(image.format)) or str(image.format).lower()


def _open(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=FORMATS)


def _rgb(image: Image.Image) -> Image.Image:
    """Return a picture in RGB, on white where it is transparent."""
    if image.mode.startswith("I"):
        # Greys of 16 bits, which Pillow would cut off at 255 where they have to be scaled.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def centre_view(image: Image.Image, size: int) -> UInt8[np.ndarray, "3 size size"]:
    """Return the picture's centre square, resized."""
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return _resize(image, size, (left, top, left + side, top + side))


def random_view(
    image: Image.Image,
    size: int,
    *,
    crop_scale: tuple[float, float],
    flip: bool,
    colour_jitter: float,
    random: np.random.Generator,
) -> UInt8[np.ndarray, "3 size size"]:
    """Return a random crop, perhaps mirrored, in slightly other colours.

    Args:
        image: RGB.
        size: Side of the result, in pixels.
        crop_scale: Least and greatest share of the area; (1, 1) takes the centre square.
        flip: Whether half of the results are mirrored.
        colour_jitter: Greatest change of brightness, contrast and saturation.
        random: Where all choices come from.

    Source:
        The crop of Szegedy et al. 2015 (arXiv:1409.4842), section 6: area share and aspect ratio
        between 3/4 and 4/3, as torchvision's RandomResizedCrop draws them.
    """
    box = None if crop_scale == (1.0, 1.0) else _random_box(image, crop_scale, random)
    view = centre_view(image, size) if box is None else _resize(image, size, box)
    if flip and random.random() < 0.5:
        view = view[:, :, ::-1]
    if colour_jitter:
        picture = Image.fromarray(np.ascontiguousarray(view.transpose(1, 2, 0)))
        enhancers: list[Callable[[Image.Image], ImageEnhance._Enhance]]
        enhancers = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
        for enhance in enhancers:
            picture = enhance(picture).enhance(1 + random.uniform(-colour_jitter, colour_jitter))
        view = np.asarray(picture).transpose(2, 0, 1)
    return view


def _random_box(
    image: Image.Image, crop_scale: tuple[float, float], random: np.random.Generator
) -> tuple[float, float, float, float] | None:
    """Return left, top, right, bottom of a crop; nothing if ten tries find none that fits."""
    for _ in range(10):
        area = image.width * image.height * random.uniform(*crop_scale)
        aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        width, height = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if width <= image.width and height <= image.height:
            left = random.uniform(0, image.width - width)
            top = random.uniform(0, image.height - height)
            return left, top, left + width, top + height
    return None


def _resize(
    image: Image.Image, size: int, box: tuple[float, float, float, float]
) -> UInt8[np.ndarray, "3 size size"]:
    view = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return np.asarray(view).transpose(2, 0, 1)
