"""From pixels to the square picture that the encoder sees. Importing this room imports torch."""

import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageEnhance

from captionscale.data.resize import resize_image

# Left, top, right and bottom of a crop, in whole pixels.
_Box = tuple[int, int, int, int]
_Picture = UInt8[np.ndarray, "height width 3"]


def center_crop(image: _Picture, size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """Return the picture's centre square, resized."""
    return _resize(image, size, _center_box(image))


def augment(
    image: _Picture,
    size: int,
    *,
    crop_scale: tuple[float, float],
    flip: bool,
    color_jitter: float,
    rotate: float = 0.0,
    random: np.random.Generator,
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """Return a random crop, perhaps turned a little and mirrored, in slightly other colours.

    Args:
        image: RGB.
        size: Side of the result, in pixels.
        crop_scale: Least and greatest share of the area; (1, 1) takes the centre square.
        flip: Whether half of the results are mirrored.
        color_jitter: Greatest change of brightness, contrast and saturation.
        rotate: Greatest angle by which the picture is turned about the crop's centre, in degrees. What the
            crop then holds from beyond the picture's edges has the picture's mean colour.
        random: Where all choices come from.

    Source:
        The crop of Szegedy et al. 2015 (arXiv:1409.4842), section 6: area share and aspect ratio
        between 3/4 and 4/3, as torchvision's RandomResizedCrop draws them.
    """
    box = None if crop_scale == (1.0, 1.0) else _random_box(image, crop_scale, random)
    box = box or _center_box(image)
    view = _turn(image, size, box, random.uniform(-rotate, rotate)) if rotate else _resize(image, size, box)
    if flip and random.random() < 0.5:
        # NumPy takes four times as long.
        view = torch.from_numpy(view).flip(1).numpy()
    if color_jitter:
        picture = Image.fromarray(view)
        enhancers: list[Callable[[Image.Image], ImageEnhance._Enhance]]
        enhancers = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
        for enhance in enhancers:
            picture = enhance(picture).enhance(1 + random.uniform(-color_jitter, color_jitter))
        view = np.array(picture)
    return view


def _random_box(image: _Picture, crop_scale: tuple[float, float], random: np.random.Generator) -> _Box | None:
    """Return a crop; nothing if ten tries find none that fits."""
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


def _center_box(image: _Picture) -> _Box:
    height, width = image.shape[:2]
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def _resize(image: _Picture, size: int, box: _Box) -> UInt8[np.ndarray, "{size} {size} 3"]:
    left, top, right, bottom = box
    return resize_image(np.ascontiguousarray(image[top:bottom, left:right]), size, size, "bilinear")


def _turn(image: _Picture, size: int, box: _Box, degrees: float) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """Return what a crop holds once the picture is turned counter-clockwise about the crop's centre."""
    left, top, right, bottom = box
    # A transform reads four neighbours of each point and would pass over what lies between them.
    shrink = max(1, int(min(right - left, bottom - top) / size))
    small = Image.fromarray(image).reduce(shrink)
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    # Pixels of the small picture for each one of the view, along its rows and its columns.
    across, down = (right - left) / size / shrink, (bottom - top) / size / shrink
    matrix = np.array([[cos * across, -sin * down], [sin * across, cos * down]])
    centre = np.array([left + right, top + bottom]) / 2 / shrink
    (a, b), (d, e) = matrix.tolist()
    c, f = (centre - matrix @ [size / 2, size / 2]).tolist()
    mean = small.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    view = small.transform(
        (size, size), Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BILINEAR, fillcolor=mean
    )
    return np.array(view)
