"""Image transforms: from pixels to the encoder's square input. Imports torch."""

import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageEnhance

from captionscale.config_model import Interpolation
from captionscale.data.resize import resize_image

# Left, top, right and bottom of a crop, in whole pixels.
_Box = tuple[int, int, int, int]
_Pixels = UInt8[np.ndarray, "height width 3"]
_Square = UInt8[np.ndarray, "{size} {size} 3"]
_ENHANCERS: list[Callable[[Image.Image], ImageEnhance._Enhance]]
_ENHANCERS = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]


def center_crop(image: _Pixels, size: int, interpolation: Interpolation = "bilinear") -> _Square:
    """Return the center square, resized."""
    return _resize(image, size, _center_box(image), interpolation)


def augment(
    image: _Pixels,
    size: int,
    *,
    crop_scale: tuple[float, float],
    flip: bool,
    color_jitter: float,
    rotate: float = 0.0,
    interpolation: Interpolation = "bilinear",
    random: np.random.Generator,
) -> _Square:
    """Return a random crop, optionally rotated, flipped and color-jittered.

    Args:
        image: RGB.
        size: Side of the result, in pixels.
        crop_scale: Least and greatest fraction of the area; (1, 1) takes the center square.
        flip: Mirror half of the results.
        color_jitter: Maximum relative change of brightness, contrast and saturation.
        rotate: Maximum rotation about the crop's center, in degrees; outside is the image's mean color.
        interpolation: How the crop is resized.
        random: Random number generator.

    Source:
        The crop of Szegedy et al. 2015 (arXiv:1409.4842), section 6: area fraction and aspect ratio
        between 3/4 and 4/3, as torchvision's RandomResizedCrop draws them.
    """
    box = None if crop_scale == (1.0, 1.0) else _random_box(image, crop_scale, random)
    box = box or _center_box(image)
    if rotate:
        view = _rotate(image, size, box, random.uniform(-rotate, rotate), interpolation)
    else:
        view = _resize(image, size, box, interpolation)
    if flip and random.random() < 0.5:
        # NumPy is four times slower.
        view = torch.from_numpy(view).flip(1).numpy()
    if color_jitter:
        pil = Image.fromarray(view)
        for enhancer in _ENHANCERS:
            pil = enhancer(pil).enhance(1 + random.uniform(-color_jitter, color_jitter))
        view = np.array(pil)
    return view


def _random_box(image: _Pixels, crop_scale: tuple[float, float], random: np.random.Generator) -> _Box | None:
    """Return a random crop, or None after ten tries that do not fit."""
    height, width = image.shape[:2]
    for _ in range(10):
        area = width * height * random.uniform(*crop_scale)
        aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        across, down = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if across <= width and down <= height:
            wide, high = max(1, round(across)), max(1, round(down))
            left, top = round(random.uniform(0, width - wide)), round(random.uniform(0, height - high))
            return left, top, left + wide, top + high
    return None


def _center_box(image: _Pixels) -> _Box:
    height, width = image.shape[:2]
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def _resize(image: _Pixels, size: int, box: _Box, interpolation: Interpolation) -> _Square:
    left, top, right, bottom = box
    return resize_image(np.ascontiguousarray(image[top:bottom, left:right]), size, size, interpolation)


def _rotate(image: _Pixels, size: int, box: _Box, degrees: float, interpolation: Interpolation) -> _Square:
    """Rotate counter-clockwise about the crop's center, and return the resized crop."""
    left, top, right, bottom = box
    # `transform` interpolates 4 or 16 neighbors, so reduce first to avoid aliasing.
    shrink = max(1, int(min(right - left, bottom - top) / size))
    small = Image.fromarray(image).reduce(shrink)
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    # Input pixels per output pixel, along rows and columns.
    across, down = (right - left) / size / shrink, (bottom - top) / size / shrink
    matrix = np.array([[cos * across, -sin * down], [sin * across, cos * down]])
    center = np.array([left + right, top + bottom]) / 2 / shrink
    affine = np.column_stack([matrix, center - matrix @ [size / 2, size / 2]]).ravel().tolist()
    mean = small.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    resample = Image.Resampling[interpolation.upper()]
    return np.array(small.transform((size, size), Image.Transform.AFFINE, affine, resample, fillcolor=mean))
