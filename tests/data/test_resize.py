import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image, ImageCms, ImageOps

from captionscale.data.decode import FORMATS, decode_image
from captionscale.data.resize import resize_image, resize_to_jpeg
from captionscale.errors import UserError

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


def drawn(width: int, height: int) -> Image.Image:
    """Return an image of smooth colors with a hard edge."""
    y, x = np.mgrid[:height, :width]
    image = np.stack([x * 255 // width, y * 255 // height, (x + y) % 97 * 2], axis=2).astype(np.uint8)
    image[height // 3 : height // 2, width // 4 : width // 2] = (255, 0, 40)
    return Image.fromarray(image)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8))


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of two images, in decibels."""
    error = np.mean((first.astype(float) - second.astype(float)) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def smaller(data: bytes, side: int) -> bytes:
    return resize_to_jpeg(data, "here", side=side, quality=95)


# ---- scaling


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((640, 480), (341, 256)),
        ((480, 640), (256, 341)),
        ((257, 300), (256, 299)),
        ((1920, 1080), (114, 64)),
        ((65, 3000), (64, 2954)),
        ((40, 30), (1, 1)),
    ],
)
@pytest.mark.parametrize("make", [drawn, noise])
def test_resized_pixels_equal_pillows(make, old: tuple[int, int], new: tuple[int, int]) -> None:
    image = make(*old)
    # Width first: of a tall image Pillow itself takes the height first, and clips other overshoots.
    wide = image.resize((new[0], old[1]), Image.Resampling.BICUBIC)
    expected = np.asarray(wide.resize(new, Image.Resampling.BICUBIC))
    assert psnr(resize_image(np.array(image), new[1], new[0]), expected) > 60


def test_resized_real_images_equal_pillows() -> None:
    files = sorted((SHARED / "coco_sample").glob("*2017/*.jpg"))[::5]
    if not files:
        pytest.skip("needs ../shared/data next to the checkout")
    for file in files:
        image = decode_image(file.read_bytes(), str(file))
        for side in (64, 224, 256):
            expected = np.asarray(ImageOps.cover(Image.fromarray(image), (side, side)))
            if side < min(image.shape[:2]):
                assert psnr(resize_image(image, *expected.shape[:2]), expected) > 60


def test_resizing_does_not_depend_on_the_number_of_threads() -> None:
    image, before = np.array(noise(300, 200)), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = resize_image(image, 100, 150)
        torch.set_num_threads(4)
        np.testing.assert_array_equal(resize_image(image, 100, 150), alone)
    finally:
        torch.set_num_threads(before)


# ---- what is stored


@pytest.mark.parametrize(
    "size",
    [(640, 480), (480, 640), (65, 64), (64, 65), (65, 65), (500, 333), (333, 500), (65, 2001), (67, 131)],
)
def test_the_shorter_side_is_as_requested_and_the_longer_one_as_in_pillow(size: tuple[int, int]) -> None:
    image = drawn(*size)
    for side in (1, 2, 63, 64):
        found = Image.fromarray(decode_image(smaller(encode(image, "PNG"), side), "here"))
        assert min(found.size) == side
        assert found.size == ImageOps.cover(image, (side, side)).size


@pytest.mark.parametrize("quality", [1, 75, 90, 95, 100])
def test_the_result_is_a_420_jpeg_of_the_given_quality(quality: int) -> None:
    data = encode(drawn(100, 80), "PNG")
    found = resize_to_jpeg(data, "here", side=40, quality=quality)
    assert simplejpeg.decode_jpeg_header(found) == (40, 50, "YCbCr", "420")
    reference = encode(drawn(50, 40), "JPEG", quality=quality)
    assert Image.open(io.BytesIO(found)).quantization == Image.open(io.BytesIO(reference)).quantization


def test_the_result_has_the_pixels_that_training_reads() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    glass = drawn(200, 150).convert("RGBA")
    glass.putalpha(Image.linear_gradient("L").resize((200, 150)))
    gray = Image.fromarray(np.arange(200 * 150, dtype=np.uint16).reshape(150, 200) * 2)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    kinds = [
        encode(drawn(200, 150), "JPEG", quality=95),
        encode(drawn(200, 150), "JPEG", quality=95, progressive=True),
        encode(drawn(200, 150), "JPEG", quality=95, exif=exif, icc_profile=profile),
        encode(drawn(200, 150), "MPO", save_all=True, append_images=[noise(200, 150)], quality=95),
        encode(drawn(200, 150).convert("L"), "JPEG"),
        encode(drawn(200, 150).convert("CMYK"), "JPEG"),
        encode(gray, "PNG"),
        encode(glass, "PNG"),
        encode(glass.quantize(64), "PNG"),
        encode(drawn(200, 150), "PNG", save_all=True, append_images=[noise(200, 150)]),
        encode(drawn(200, 150), "GIF", save_all=True, append_images=[noise(200, 150)]),
        encode(glass, "WEBP"),
        encode(drawn(200, 150), "BMP"),
        encode(drawn(200, 150), "JPEG") + b"trailing garbage",
    ]
    for data in kinds:
        found = smaller(data, 100)
        expected = ImageOps.cover(Image.fromarray(decode_image(data, "here")), (100, 100))
        shown = Image.open(io.BytesIO(found))
        assert psnr(np.asarray(shown.convert("RGB")), np.asarray(expected)) > 25
        assert shown.info.keys().isdisjoint({"exif", "icc_profile", "xmp"})
        assert shown.getexif() == {}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("size", [(64, 64), (64, 90), (90, 64), (64, 63), (1, 1)])
def test_an_image_that_is_small_already_keeps_its_bytes(kind: str, size: tuple[int, int]) -> None:
    data = encode(noise(*size), kind)
    assert smaller(data, 64) == data


def test_an_image_too_thin_for_a_jpeg_keeps_its_bytes() -> None:
    for size in ((1, 5000), (5000, 1), (65, 66600), (66600, 65)):
        data = encode(Image.new("RGB", size), "PNG")
        assert smaller(data, 64) == data
    longest = smaller(encode(Image.new("RGB", (65, 66500)), "PNG"), 64)
    assert decode_image(longest, "here").shape == (65477, 64, 3)


@pytest.mark.parametrize("side", [16, 64])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_damaged_image_of_any_size_is_refused(kind: str, side: int) -> None:
    data = encode(noise(40, 30), kind)
    for broken in (data[: len(data) // 2], b"", b"<html></html>"):
        with pytest.raises(UserError, match="here: not a readable image"):
            smaller(broken, side)


def test_equal_bytes_give_equal_bytes() -> None:
    data = encode(drawn(200, 150), "JPEG")
    assert len({smaller(data, 100) for _ in range(5)}) == 1
