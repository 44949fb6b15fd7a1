from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from captionscale.data.decode import decode_image
from captionscale.data.transforms import augment, center_crop

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
PLAIN = {"crop_scale": (1.0, 1.0), "flip": False, "color_jitter": 0.0}
WILD = {"crop_scale": (0.3, 1.0), "flip": True, "color_jitter": 0.4}


def quarters(width: int = 64, height: int = 48) -> Image.Image:
    """Return red, green, blue and white quarters: top left, top right, bottom left, bottom right."""
    image = Image.new("RGB", (width, height), WHITE)
    image.paste(RED, (0, 0, width // 2, height // 2))
    image.paste(GREEN, (width // 2, 0, width, height // 2))
    image.paste(BLUE, (0, height // 2, width // 2, height))
    return image


def noise(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8)


# ---- crops and colors


def test_the_center_crop_is_the_center_square_upright_and_not_flipped() -> None:
    for width, height in ((64, 48), (48, 64), (48, 48), (49, 64)):
        image = Image.new("RGB", (width, height), (255, 0, 255))
        side = min(width, height)
        image.paste(quarters(side, side), ((width - side) // 2, (height - side) // 2))
        view = center_crop(np.array(image), 32)
        corners = [tuple(view[row, column].tolist()) for row in (2, -3) for column in (2, -3)]
        assert corners == [RED, GREEN, BLUE, WHITE]


def test_the_center_crop_of_a_square_of_the_same_size_is_that_square() -> None:
    image = noise(40, 40)
    np.testing.assert_array_equal(center_crop(image, 40), image)


def test_an_augmented_image_depends_on_its_generator_only() -> None:
    image = noise(50, 40)
    views = [
        augment(image, 32, **WILD, random=np.random.default_rng(seed)) for seed in (*range(8), *range(8))
    ]
    for first, second in zip(views[:8], views[8:], strict=True):
        np.testing.assert_array_equal(first, second)
    assert len({view.tobytes() for view in views}) == 8


def test_augmentation_without_crop_flip_and_jitter_is_the_center_crop() -> None:
    for width, height in ((50, 40), (40, 50), (90, 30)):
        image = noise(width, height)
        view = augment(image, 32, **PLAIN, random=np.random.default_rng(3))
        np.testing.assert_array_equal(view, center_crop(image, 32))


def test_half_of_the_images_are_flipped() -> None:
    image = noise(40, 40)
    straight = center_crop(image, 32)
    random = np.random.default_rng(0)
    mirrored = 0
    for _ in range(200):
        view = augment(image, 32, **(PLAIN | {"flip": True}), random=random)
        if not np.array_equal(view, straight):
            np.testing.assert_array_equal(view, straight[:, ::-1])
            mirrored += 1
    assert 70 < mirrored < 130


def test_a_crop_lies_inside_the_image_and_keeps_the_requested_area() -> None:
    # Each pixel is its own position, so that a view shows where it was cut.
    y, x = np.mgrid[:200, :240].astype(np.uint8)
    image = np.stack([x, y, x * 0], axis=2)
    random = np.random.default_rng(0)
    for _ in range(100):
        view = augment(image, 32, **(PLAIN | {"crop_scale": (0.25, 0.5)}), random=random).astype(float)
        width, height = (np.ptp(view[..., channel]) * 32 / 31 for channel in (0, 1))
        assert 0.22 < width * height / (240 * 200) < 0.55
        assert 0.7 < width / height < 1.42
        assert view[..., 2].max() == 0


def test_jitter_changes_colors_only() -> None:
    image = np.array(quarters(40, 40))
    view = augment(image, 32, **(PLAIN | {"color_jitter": 0.4}), random=np.random.default_rng(1))
    assert not np.array_equal(view, center_crop(image, 32))
    red, green, blue, white = (view[row, column].astype(int) for row in (3, -4) for column in (3, -4))
    assert red.argmax() == 0
    assert green.argmax() == 1
    assert blue.argmax() == 2
    assert np.ptp(white) == 0


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (8, 3), (40, 3000), (2000, 30)])
def test_an_image_of_any_shape_has_views_of_the_requested_size(shape: tuple[int, int]) -> None:
    image = noise(*shape)
    for seed in range(20):
        view = augment(image, 32, **WILD, rotate=9.0, random=np.random.default_rng(seed))
        assert (view.shape, view.dtype) == ((32, 32, 3), np.uint8)
    assert center_crop(image, 32).shape == (32, 32, 3)


def test_real_images_have_the_crops_of_pillow(real_data: Path) -> None:
    for file in sorted((real_data / "coco_sample").glob("val2017/*.jpg"))[:40]:
        image = decode_image(file.read_bytes(), "here")
        height, width = image.shape[:2]
        side = min(height, width)
        left, top = (width - side) // 2, (height - side) // 2
        square = Image.fromarray(image[top : top + side, left : left + side])
        for name, steps in (("bilinear", 1), ("bicubic", 2)):
            expected = np.asarray(square.resize((224, 224), Image.Resampling[name.upper()]))
            difference = np.abs(center_crop(image, 224, name).astype(int) - expected)
            assert difference.max() <= steps
            assert difference.mean() < 0.05


def test_bicubic_views_are_those_of_pillow_and_bilinear_is_the_default() -> None:
    image, random = np.array(quarters(97, 61)), np.random.default_rng
    square = Image.fromarray(image[:, 18:79])
    for name in ("bilinear", "bicubic"):
        expected = np.asarray(square.resize((32, 32), Image.Resampling[name.upper()])).astype(int)
        assert np.abs(center_crop(image, 32, name) - expected).max() <= 1
        assert np.abs(augment(image, 32, **PLAIN, interpolation=name, random=random(0)) - expected).max() <= 1
    for options in ({}, {"rotate": 20.0}):
        views = [
            augment(image, 48, **WILD, **options, **choice, random=random(5))
            for choice in ({}, {"interpolation": "bilinear"}, {"interpolation": "bicubic"})
        ]
        np.testing.assert_array_equal(views[0], views[1])
        assert not np.array_equal(views[1], views[2])


# ---- rotated images


def test_without_rotation_no_random_number_is_drawn() -> None:
    image = noise(90, 70)
    views = [
        augment(image, 32, **WILD, **more, random=np.random.default_rng(5)) for more in ({}, {"rotate": 0.0})
    ]
    np.testing.assert_array_equal(*views)


def turned(image: np.ndarray, size: int, degrees: float, **changes: Any) -> np.ndarray:
    """Return a view that is turned by this angle, whatever the chance."""

    class Always(np.random.Generator):
        def uniform(self, low: float, high: float) -> float:
            return degrees if low == -high else super().uniform(low, high)

    options = PLAIN | {"rotate": 45.0} | changes
    return augment(image, size, **options, random=Always(np.random.PCG64(0)))


def test_a_rotation_by_zero_changes_nothing() -> None:
    for image in (np.array(quarters()), np.array(quarters(97, 61))):
        for size in (16, 48, 61):
            difference = turned(image, size, 0.0).astype(int) - center_crop(image, size)
            assert np.abs(difference).mean() < 5


def test_an_image_rotates_counter_clockwise_about_its_center_as_in_pillow() -> None:
    # Smooth, so that the two ways of sampling agree.
    rows, columns = np.mgrid[:80, :80]
    waves = np.stack([rows * 3, columns * 3, (rows + columns) * 1.5], 2).clip(0, 255).astype(np.uint8)
    for degrees in (-30.0, 12.0, 45.0):
        expected = np.asarray(Image.fromarray(waves).rotate(degrees, Image.Resampling.BILINEAR))
        found = turned(waves, 80, degrees)
        inside = (rows - 39.5) ** 2 + (columns - 39.5) ** 2 < 38**2
        assert np.abs(found.astype(int) - expected)[inside].max() <= 1


def test_a_rotated_crop_shows_the_image_and_outside_its_mean_color() -> None:
    image = np.full((100, 100, 3), (200, 10, 60), np.uint8)
    # One color: neither black corners nor seams.
    assert set(map(tuple, turned(image, 32, 30.0).reshape(-1, 3).tolist())) == {(200, 10, 60)}
    half = np.zeros((100, 100, 3), np.uint8)
    half[:50] = 255
    corner = turned(half, 100, 45.0)[2, 2]
    assert (np.abs(corner.astype(int) - 127) <= 2).all()


def test_a_large_image_is_averaged_before_rotation() -> None:
    # Every second row is black: without averaging, a view would be bands of black and white.
    stripes = np.zeros((400, 400, 3), np.uint8)
    stripes[::2] = 255
    view = turned(stripes, 50, 0.5)
    assert np.ptp(view[2:-2, 2:-2].astype(int)) <= 3


def test_angles_are_of_both_signs_and_within_the_maximum() -> None:
    image = np.array(quarters(64, 64))
    views = [augment(image, 32, **PLAIN, rotate=40.0, random=np.random.default_rng(n)) for n in range(20)]
    assert len({view.tobytes() for view in views}) == 20
    # Where green begins, eight rows above the middle: more to the left if the image turned to the left.
    ends = [int(np.flatnonzero(view[8, :, 1] < 64).max()) for view in views]
    assert min(ends) < 12
    assert max(ends) > 19
    assert all(abs(end - 15.5) <= 7.5 * np.tan(np.radians(40)) + 1 for end in ends)
