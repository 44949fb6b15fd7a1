"""Drawings of the synthetic data set: toys and scenery as strings of shapes."""

from functools import cache
from random import Random
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageEnhance, ImageOps

# Twice the size is drawn, then halved: Pillow draws hard edges.
SUPERSAMPLING = 2

COLORS = {
    "red": "#d61e26",
    "orange": "#fa8408",
    "yellow": "#fcde26",
    "green": "#16843c",
    "blue": "#1c4ed6",
    "purple": "#8a30b8",
}
INK = "#2c2834"

# A sketch is "shape color numbers; ..." in a square of 100 by 100, y downwards, and may exceed it. `paint` is
# the toy's color. A poly has points, a line its width and points, an oval a box, a pie a box and two angles.
TOYS = {
    "ball": "oval paint 8 16 92 100; pie white 8 16 92 100 20 58; pie white 8 16 92 100 140 178;"
    "pie white 8 16 92 100 260 298; oval paint 40 48 60 68",
    "gift": "oval white 20 6 50 30; oval white 50 6 80 30; poly paint 10 40 90 40 90 100 10 100;"
    "poly paint 3 27 97 27 97 45 3 45; poly white 42 27 58 27 58 100 42 100",
    "house": "poly paint 68 8 82 8 82 45 68 45; poly paint 12 42 88 42 88 100 12 100;"
    "poly paint 50 2 100 48 0 48; poly #0005 50 2 100 48 0 48; poly white 22 62 42 62 42 100 22 100;"
    "poly lightblue 55 60 78 60 78 80 55 80",
    "tree": "poly sienna 43 50 57 50 61 100 39 100; oval paint 4 28 56 74; oval paint 44 28 96 74;"
    "oval paint 20 0 80 56",
    "car": "poly paint 20 56 32 28 70 28 86 56; poly lightblue 28 56 36 34 49 34 49 56;"
    "poly lightblue 54 56 54 34 66 34 77 56; poly paint 0 60 5 54 90 54 100 64 100 88 0 88;"
    "oval black 12 76 36 100; oval black 64 76 88 100; oval white 20 84 28 92; oval white 72 84 80 92",
    "boat": "poly sienna 47 2 52 2 52 75 47 75; poly paint 55 5 95 60 55 64; poly white 44 14 44 64 10 60;"
    "poly paint 0 70 100 70 82 100 18 100",
    "umbrella": "poly sienna 47 2 53 2 53 100 47 100; pie paint 0 6 100 106 180 360;"
    "pie white 0 6 100 106 214 246; pie white 0 6 100 106 294 326",
    "cat": "poly paint 66 86 80 84 86 74 82 58 92 54 98 74 92 92 68 100; oval paint 22 46 78 100;"
    "poly paint 20 2 46 16 22 36; poly paint 80 2 54 16 78 36; oval paint 17 10 83 60;"
    "oval white 28 25 43 41; oval white 57 25 72 41; oval black 33 29 40 38; oval black 60 29 67 38;"
    "poly pink 45 43 55 43 50 50",
    "balloon": "line gray 2 50 74 45 82 55 90 50 100; poly paint 50 66 57 76 43 76; oval paint 19 0 81 70;"
    "oval white 30 12 42 28",
    "kite": "line gray 2 50 72 60 80 42 90 52 100; poly paint 50 0 90 30 50 76 10 30;"
    "poly white 50 0 50 30 10 30; poly white 50 76 50 30 90 30",
}
FLYING = {"balloon", "kite"}
PROPS = {
    "dot": "oval cornsilk 0 0 100 100",
    "moon": "oval cornsilk 0 0 100 100; oval #161b42 28 -12 116 82",
    "cloud": "oval #fffc 0 14 46 40; oval #fffc 20 0 80 44; oval #fffc 58 14 100 40",
    "mountain": "poly #8c9eb8 50 0 105 50 -5 50; poly white 50 0 68 16 58 14 50 20 42 14 32 16",
    "sea": "poly #40a4c4 0 0 100 0 100 30 0 30; line white 1.4 0 9 100 9;"
    + ";".join(f"line #fffc .4 {x} {2 + x % 5} {x + 11} {2 + x % 5}" for x in range(4, 100, 14)),
    "wall": ";".join(f"line cornsilk 2 {x} 0 {x} 60" for x in range(5, 100, 15)),
    "window": "poly white 0 0 100 0 100 130 0 130; poly lightblue 8 8 92 8 92 122 8 122;"
    "line white 8 50 0 50 130; line white 8 0 66 100 66",
    "boards": "line white 2 0 0 100 0;" + ";".join(f"line #60402870 .5 0 {y} 100 {y}" for y in (6, 12, 19)),
    "tower": "poly #9aa6bc 0 0 94 0 94 400 0 400;"
    + ";".join(f"line cornsilk 12 16 {y} 78 {y}" for y in range(20, 180, 36))
    + ";line #9aa6bc 12 36 0 36 300; line #9aa6bc 12 60 0 60 300",
    "lane": "line silver 3 0 -15 100 -15;"
    + ";".join(f"line #fffc 1.6 {x} 0 {x + 10} 0" for x in range(4, 100, 20)),
}

# Scenery: a prop, the number of copies, their width, and the lowest and highest top above the horizon, as
# fractions of the image's side.
SPREAD = {
    "clouds": ("cloud", 3, 0.36, 0.3, 0.58),
    "flowers": ("dot", 24, 0.018, -0.38, -0.04),
    "waves": ("sea", 1, 1.8, 0.16, 0.16),
    "mountains": ("mountain", 3, 0.7, 0.2, 0.34),
    "flakes": ("dot", 40, 0.018, -0.38, 0.62),
    "stars": ("dot", 45, 0.012, 0.02, 0.62),
    "moon": ("moon", 1, 0.14, 0.5, 0.54),
    "wall": ("wall", 1, 1.8, 0.66, 0.66),
    "window": ("window", 1, 0.28, 0.5, 0.54),
    "boards": ("boards", 1, 1.8, 0.0, 0.0),
    "towers": ("tower", 6, 0.18, 0.2, 0.5),
    "lane": ("lane", 1, 1.8, -0.26, -0.26),
}
# Colors of the sky from top to bottom, then of the ground; scenery behind the ground, and on it.
SCENERY = {
    "meadow": ("#78bef0 #e8f4fc #b0da6e #6ca840", "clouds", "flowers"),
    "beach": ("#8ad4ee #f0faf8 #f6e4b0 #d8b070", "clouds waves", ""),
    "snow": ("#a4b8d0 #e8eef4 #fafcff #c8daf0", "mountains", "flakes"),
    "night": ("#0c102e #4a5490 #40606a #10202a", "stars moon", ""),
    "room": ("#f0dcc4 #e0ccb4 #c09468 #8c6440", "wall window", "boards"),
    "street": ("#b4cce0 #f4f6f4 #84868e #585a62", "towers", "lane"),
}

# Left, top and side of a square.
Box = tuple[float, float, float]


class Toy(NamedTuple):
    """A toy in an image."""

    kind: str
    color: str


class Scene(NamedTuple):
    """The content of an image, which its captions describe.

    A single toy is small or large, and left, middle or right. A pair is of medium size, and its first toy is
    `beside` the second, on its left, or `above` it.
    """

    setting: str
    toys: tuple[Toy, ...]
    relation: str
    size: str


def draw_scene(scene: Scene, size: int, random: Random) -> Image.Image:
    """Draw a scene as a square image of `size` pixels; `random` varies positions, sides and light."""
    side = size * SUPERSAMPLING
    horizon = random.uniform(0.6, 0.66)
    colors, behind, before = SCENERY[scene.setting]
    sky_top, sky_bottom, ground_top, ground_bottom = colors.split()
    image = _ramp(sky_top, sky_bottom, side).copy()
    canvas = ImageDraw.Draw(image, "RGBA")

    def spread(names: str) -> None:
        for name in names.split():
            prop, count, width, lowest, highest = SPREAD[name]
            for number in range(count):
                x = (number + random.uniform(0.2, 0.8)) / count
                y = horizon - random.uniform(lowest, highest)
                _sketch(canvas, PROPS[prop], (side * (x - width / 2), side * y, side * width))

    spread(behind)
    image.paste(_ramp(ground_top, ground_bottom, side), (0, round(side * horizon)))
    spread(before)
    for toy, (left, top, width) in zip(scene.toys, _places(scene, random), strict=True):
        box = (side * left, side * top, side * width)
        if toy.kind not in FLYING:
            _sketch(canvas, "oval #0004 -2 93 102 107", box)
        flip = random.random() < 0.5
        _sketch(canvas, TOYS[toy.kind], box, COLORS[toy.color], pen=max(1, round(box[2] / 50)), flip=flip)
    light = random.uniform(0.93, 1.05)
    return ImageEnhance.Brightness(image.reduce(SUPERSAMPLING)).enhance(light)


@cache
def _ramp(top: str, bottom: str, side: int) -> Image.Image:
    """Return a square that fades from one color to another; do not draw on it."""
    return ImageOps.colorize(Image.linear_gradient("L"), top, bottom).resize((side, side))


def _places(scene: Scene, random: Random) -> list[Box]:
    """Return left, top and width of each toy, as fractions of the image's side."""
    width = {"small": 0.32, "medium": 0.43, "large": 0.6}[scene.size]
    reach, column = 0.48 - width / 2, random.uniform(-0.2, 0.2)
    columns = {"left": [-reach], "middle": [0.0], "right": [reach], "beside": [-reach, reach]}
    places = []
    for toy, offset in zip(scene.toys, columns.get(scene.relation, [column, column]), strict=True):
        left = 0.5 + offset - width / 2 + random.uniform(-0.02, 0.02)
        high, low = (0.04, 0.12) if toy.kind in FLYING else (0.88 - width, 0.95 - width)
        # A flying toy above another one must not overlap it.
        top = random.uniform(high, high if scene.relation == "above" else low)
        places.append((left, top, width))
    return places


def _sketch(
    canvas: ImageDraw.ImageDraw, sketch: str, box: Box, paint: str = "", pen: int = 0, flip: bool = False
) -> None:
    """Draw a sketch into a square, with outlines `pen` pixels wide."""
    left, top, side = box
    outline = INK if pen else None
    for part in sketch.split(";"):
        shape, color, *fields = part.split()
        numbers = [float(field) for field in fields]
        fill = paint if color == "paint" else color
        width = numbers.pop(0) / 100 * side if shape == "line" else 0
        end, start = (numbers.pop(), numbers.pop()) if shape == "pie" else (0.0, 0.0)
        xs = [left + side * (100 - x if flip else x) / 100 for x in numbers[::2]]
        ys = [top + side * y / 100 for y in numbers[1::2]]
        points, box_of = list(zip(xs, ys, strict=True)), (min(xs), ys[0], max(xs), ys[1])
        if shape == "line":
            canvas.line(points, fill, max(1, round(width)))
        elif shape == "poly":
            canvas.polygon(points, fill, outline, pen)
        elif shape == "oval":
            canvas.ellipse(box_of, fill, outline, pen)
        else:
            start, end = (180 - end, 180 - start) if flip else (start, end)
            canvas.pieslice(box_of, start, end, fill, outline, pen)
