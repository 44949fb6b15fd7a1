import io
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from captionscale.data.decode import FORMATS, ImageInfo, decode_image, image_info
from captionscale.errors import UserError

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
# What Pillow does to an upright image so that the orientation of the key turns it back.
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
SHARED = Path(__file__).parents[2].parent / "shared" / "data"


def decode_pil(data: bytes, place: str) -> Image.Image:
    return Image.fromarray(decode_image(data, place))


# Every way to read an image; the last reads no further than the header.
WHOLE_READS: list[Callable[[bytes, str], Any]]
WHOLE_READS = [decode_image, decode_pil, lambda data, place: image_info(data, place, full_decode=True)]
READS = [*WHOLE_READS, lambda data, place: image_info(data, place, full_decode=False)]


def quarters(width: int = 64, height: int = 48) -> Image.Image:
    """Return red, green, blue and white quarters: top left, top right, bottom left, bottom right."""
    image = Image.new("RGB", (width, height), WHITE)
    image.paste(RED, (0, 0, width // 2, height // 2))
    image.paste(GREEN, (width // 2, 0, width, height // 2))
    image.paste(BLUE, (0, height // 2, width // 2, height))
    return image


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def real_jpegs() -> list[bytes]:
    files = sorted((SHARED / "coco_sample").glob("*2017/*.jpg"))
    if not files:
        pytest.skip("needs ../shared/data next to the checkout")
    return [file.read_bytes() for file in files]


def fate(read: Callable[[], Any]) -> Any:
    """Return what a read gives, or that it refused."""
    try:
        return read()
    except UserError:
        return "refused"


def far(first: Image.Image, second: Image.Image) -> float:
    """Return the mean difference of two images, in steps of 256."""
    assert first.mode == second.mode == "RGB"
    assert first.size == second.size
    return float(np.abs(np.asarray(first, float) - np.asarray(second, float)).mean())


# ---- decode


@pytest.mark.parametrize(
    ("kind", "name", "options"),
    [
        ("JPEG", "jpg", {"quality": 95}),
        ("JPEG", "jpg", {"quality": 95, "progressive": True}),
        ("MPO", "jpg", {"quality": 95, "save_all": True, "append_images": [quarters()]}),
        ("PNG", "png", {}),
        ("WEBP", "webp", {"lossless": True}),
        ("BMP", "bmp", {}),
        ("GIF", "gif", {}),
    ],
)
def test_every_format_has_the_same_pixels_and_its_extension(
    kind: str, name: str, options: dict[str, Any]
) -> None:
    # Once, asking Pillow for MPO by name made it refuse all that is no JPEG.
    data = encode(quarters(), kind, **options)
    assert far(decode_pil(data, "here"), quarters()) < (3 if name == "jpg" else 0.01)
    for whole in (False, True):
        assert image_info(data, "here", full_decode=whole) == ImageInfo(64, 48, name)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("orientation", [1, *STORED])
def test_an_image_is_turned_upright_by_its_exif_orientation(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = quarters()
    stored = upright.transpose(STORED[orientation]) if orientation in STORED else upright
    data = encode(stored, kind, exif=exif)
    assert far(decode_pil(data, "here"), upright) < 5
    for whole in (False, True):
        assert image_info(data, "here", full_decode=whole)[:2] == upright.size


def test_the_orientation_is_found_in_xmp_and_behind_other_segments_and_fill_bytes() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = quarters().transpose(STORED[6])
    turned = encode(stored, "JPEG", exif=exif)
    colors_first = turned[:2] + b"\xff\xe2\x00\x04\xff\xda" + turned[2:]
    filled = turned[:2] + b"\xff\xff" + turned[2:]
    xmp = encode(stored, "JPEG", xmp=b'<rdf:Description tiff:Orientation="6"/>')
    for data in (turned, colors_first, filled, xmp):
        assert far(decode_pil(data, "here"), quarters()) < 5
        assert image_info(data, "here", full_decode=False) == ImageInfo(64, 48, "jpg")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "exif", [b"no TIFF", b"MM", b"MM\0*\0\0\0\x08", b"MM\0*\0\0\0\x08\0\1\1\x12\0\2\0\0\0\2x"]
)
def test_exif_that_cannot_be_read_loses_no_image(kind: str, exif: bytes) -> None:
    # Once, a PNG or WebP whose EXIF was damaged was refused, though its pixels were whole.
    data = encode(quarters(), kind, exif=b"Exif\0\0" + exif)
    with warnings.catch_warnings(action="ignore"):
        assert far(decode_pil(data, "here"), quarters()) < 5
        assert image_info(data, "here", full_decode=True)[:2] == (64, 48)


@pytest.mark.parametrize(("mode", "kind"), [("L", "PNG"), ("L", "JPEG"), ("1", "PNG"), ("LA", "PNG")])
def test_gray_becomes_three_equal_channels(mode: str, kind: str) -> None:
    gray = Image.linear_gradient("L")
    stored = gray.convert(mode)
    assert far(decode_pil(encode(stored, kind), "here"), stored.convert("L").convert("RGB")) < 1


def test_sixteen_bit_gray_is_scaled_not_clipped() -> None:
    gray = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    found = np.asarray(decode_pil(encode(Image.fromarray(gray), "PNG"), "here"))
    np.testing.assert_array_equal(found, np.repeat(np.uint8(gray >> 8)[:, :, None], 3, axis=2))


def test_palette_and_cmyk_become_rgb() -> None:
    assert far(decode_pil(encode(quarters().quantize(4), "PNG"), "here"), quarters()) < 0.01
    assert far(decode_pil(encode(quarters().convert("CMYK"), "JPEG", quality=95), "here"), quarters()) < 3


@pytest.mark.parametrize(("mode", "kind"), [("RGBA", "PNG"), ("RGBA", "WEBP"), ("P", "PNG"), ("RGBA", "GIF")])
def test_transparent_pixels_become_white(mode: str, kind: str) -> None:
    image = quarters().convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 32, 24))
    stored = image.quantize(8) if mode == "P" else image
    expected = quarters()
    expected.paste(WHITE, (0, 0, 32, 24))
    options = {"lossless": True} if kind == "WEBP" else {}
    assert far(decode_pil(encode(stored, kind, **options), "here"), expected) < 0.01


def test_half_transparent_colors_are_mixed_with_white() -> None:
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    assert decode_pil(encode(image, "PNG"), "here").getpixel((1, 1)) == (255, 127, 127)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an image",
        b"\xff\xd8\xff",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        encode(quarters(), "TIFF"),
        encode(quarters(), "AVIF"),
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99),
        b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        b"%PDF-1.7",
    ],
    ids=["empty", "text", "three bytes", "svg", "tiff", "avif", "heic", "html", "pdf"],
)
def test_a_file_of_an_unknown_format_is_refused_with_its_place(data: bytes) -> None:
    for read in READS:
        with pytest.raises(UserError) as caught:
            read(data, "some/where.jpg")
        assert str(caught.value).startswith("some/where.jpg: not a readable image (")
        assert f"{len(data):,} bytes; expected JPEG, PNG" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert "0x" not in str(caught.value)


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_a_jpeg_that_lacks_even_its_last_byte_is_refused(options: dict[str, Any]) -> None:
    data = encode(noise(40, 30), "JPEG", **options)
    for stop in (*range(0, len(data), 97), len(data) - 2, len(data) - 1):
        with pytest.raises(UserError):
            decode_pil(data[:stop], "here")


@pytest.mark.parametrize("kind", FORMATS)
def test_half_of_a_file_is_refused_in_every_format(kind: str) -> None:
    data = encode(noise(40, 30), kind)
    with pytest.raises(UserError):
        decode_pil(data[: len(data) // 2], "here")


@pytest.mark.parametrize("limit", [100, 200, 300])
def test_an_image_of_absurdly_many_pixels_is_refused(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("PNG", "JPEG"):
        data = encode(noise(20, 20), kind)
        for read in READS:
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
            read(data, "here")
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
            with pytest.raises(
                UserError, match=rf"here: more than {limit} pixels, the most expected; resize"
            ):
                read(data, "here")


ALONE = """
import sys
from PIL import Image
from captionscale.data.decode import decode_image
from captionscale.errors import UserError
bomb, odd = (bytes.fromhex(word) for word in sys.stdin.read().split())
print(decode_image(odd, "odd").shape)
Image.MAX_IMAGE_PIXELS = 300
try:
    decode_image(bomb, "bomb")
except UserError as error:
    print(error)
"""


def test_a_bomb_is_refused_and_damaged_exif_gives_no_warning_in_a_fresh_process() -> None:
    bomb = encode(noise(20, 20), "PNG")
    odd = encode(noise(8, 8), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01")
    found = subprocess.run(
        [sys.executable, "-c", ALONE],
        input=f"{bomb.hex()} {odd.hex()}",
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.startswith("(8, 8, 3)\nbomb: more than 300 pixels")
    assert found.stderr == ""


def test_decoding_does_not_change_warning_filters(monkeypatch: pytest.MonkeyPatch) -> None:
    # Once, each decode set filters and put them back: threads put back each other's, so that after some
    # thousand images a process ignored all warnings of torch.
    before, during = warnings.filters, []
    really_open = Image.open

    def spy(*arguments: Any, **options: Any) -> Image.Image:
        during.append(warnings.filters)
        return really_open(*arguments, **options)

    monkeypatch.setattr(Image, "open", spy)
    decode_pil(encode(noise(8, 8), "PNG"), "here")
    assert during
    assert all(filters is before for filters in during)


def test_a_bomb_is_refused_by_its_header_alone() -> None:
    small = encode(noise(16, 16), "JPEG")
    # A frame's height and width are five bytes behind its marker.
    at = small.index(b"\xff\xc0") + 5
    data = small[:at] + (65000).to_bytes(2) * 2 + small[at + 4 :]
    for read in READS:
        with pytest.raises(UserError, match=r"^here: more than [\d,]+ pixels"):
            read(data, "here")


# ---- one decoder


@pytest.mark.parametrize("size", [(64, 48), (37, 29), (1, 1), (1, 300), (8, 3)])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "options",
    [
        {"subsampling": 0},
        {"subsampling": 1},
        {"subsampling": 2},
        {"progressive": True},
        {"restart_marker_blocks": 2},
    ],
    ids=str,
)
def test_a_jpeg_has_the_pixels_that_pillow_gives_it(
    size: tuple[int, int], mode: str, options: dict[str, Any]
) -> None:
    data = encode(noise(*size).convert(mode), "JPEG", quality=80, **options)
    np.testing.assert_array_equal(decode_image(data, "here"), by_pillow(data))


def test_real_jpegs_have_the_pixels_that_pillow_gives_them() -> None:
    for data in real_jpegs():
        found = decode_image(data, "here")
        np.testing.assert_array_equal(found, by_pillow(data))
        assert (
            image_info(data, "here", full_decode=True)
            == image_info(data, "here", full_decode=False)
            == (*found.shape[1::-1], "jpg")
        )


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_of_several_frames_is_decoded(kind: str) -> None:
    data = encode(quarters(), kind, save_all=True, append_images=[noise(64, 48), noise(64, 48)])
    assert far(decode_pil(data, "here"), quarters()) < 5
    assert image_info(data, "here", full_decode=True) == ImageInfo(64, 48, kind.lower())


def test_pixels_can_be_written_to() -> None:
    # torch warns of arrays that cannot.
    for kind in FORMATS:
        assert decode_image(encode(noise(8, 8), kind), "here").flags.writeable


# ---- what is harmless, and what is not


def test_bytes_behind_a_jpeg_and_between_its_segments_do_no_harm() -> None:
    whole = encode(noise(64, 48), "JPEG", progressive=True)
    behind = whole + b"trailing garbage \xff\xd8\xff" * 9
    before_end = whole[:-2] + bytes(7) + whole[-2:]
    revision = whole.replace(b"JFIF\0\1\1", b"JFIF\0\x09\1")
    scan = whole.rindex(b"\xff\xda")
    between = whole[:scan] + bytes(3) + whole[scan:]
    assert len({whole, behind, before_end, revision, between}) == 5
    for data in (behind, before_end, revision, between):
        np.testing.assert_array_equal(decode_image(data, "here"), decode_image(whole, "here"))
        assert image_info(data, "here", full_decode=True) == ImageInfo(64, 48, "jpg")


def test_a_harmless_warning_does_not_hide_that_the_rest_is_missing() -> None:
    # libjpeg reports its first warning only.
    whole = encode(noise(64, 48), "JPEG").replace(b"JFIF\0\1\1", b"JFIF\0\x09\1")
    for stop in (len(whole) // 2, len(whole) - 2):
        for read in WHOLE_READS:
            with pytest.raises(UserError, match="truncated"):
                read(whole[:stop], "here")


@pytest.mark.parametrize("progressive", [False, True])
def test_missing_pixels_are_noticed_even_if_the_file_has_an_end(progressive: bool) -> None:
    # Pillow fills up with gray what a broken download lacks.
    whole = encode(noise(64, 48), "JPEG", progressive=progressive)
    half = len(whole) * 2 // 3
    for data in (whole[:half] + b"\xff\xd9", whole[:half] + bytes(len(whole) - half)):
        for read in WHOLE_READS:
            with pytest.raises(UserError, match=r"here: not a readable image \(.*[Pp]remature end"):
                read(data, "here")


def test_broken_pixels_are_noticed_where_libjpeg_notices_them() -> None:
    # Pillow lets both pass.
    whole = encode(noise(64, 48), "JPEG", restart_marker_blocks=2)
    start = whole.index(b"\xff\xda") + 50
    no_code = whole[:start] + b"\xff\0" * 20 + whole[start + 40 :]
    restarts = whole.replace(b"\xff\xd1", b"\xff\xd4")
    for data, reason in ((no_code, "bad Huffman code"), (restarts, "instead of RST")):
        assert by_pillow(data).shape == (48, 64, 3)
        for read in WHOLE_READS:
            with pytest.raises(UserError, match=rf"here: not a readable image \(.*{reason}"):
                read(data, "here")


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}, {"subsampling": 2}], ids=str
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_full_decode_refuses_exactly_what_cannot_be_decoded(mode: str, options: dict[str, Any]) -> None:
    whole = encode(noise(37, 29).convert(mode), "JPEG", **options)
    draw = np.random.default_rng(0)
    fates = []
    for _ in range(150):
        at = int(draw.integers(2, len(whole)))
        flipped = bytearray(whole)
        flipped[at] ^= 1 << draw.integers(8)
        for data in (whole[:at], whole[:at] + b"\xff\xd9", bytes(flipped)):
            with warnings.catch_warnings(action="ignore"):
                decoded = fate(lambda: decode_image(data, "here").shape[1::-1])  # noqa: B023
                assert fate(lambda: image_info(data, "here", full_decode=True)[:2]) == decoded  # noqa: B023
            fates.append(isinstance(decoded, str))
    assert 0 < sum(fates) < len(fates)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_full_decode_refuses_half_of_a_file(kind: str) -> None:
    data = encode(noise(40, 30), kind)
    with pytest.raises(UserError, match="here: not a readable image"):
        image_info(data[: len(data) // 2], "here", full_decode=True)


def test_the_info_without_decoding_reads_only_the_header() -> None:
    data = encode(noise(40, 30), "JPEG")
    assert image_info(data[: len(data) // 2 + 300], "here", full_decode=False) == ImageInfo(40, 30, "jpg")


def test_the_info_of_an_ordinary_jpeg_does_not_need_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    # It takes 8 microseconds so, and 40 to 100 with Pillow's parser.
    profile = {"icc_profile": bytes(500), "comment": "of a camera"}
    kinds = [{}, profile, {"progressive": True}, {"restart_marker_blocks": 2}]
    files = [encode(noise(40, 30), "JPEG", **options) for options in kinds]
    monkeypatch.setattr(Image, "open", None)
    for data in files:
        for whole in (False, True):
            assert image_info(data, "here", full_decode=whole) == ImageInfo(40, 30, "jpg")


@pytest.mark.usefixtures("started")
def test_reading_images_imports_no_torch() -> None:
    code = "import sys; import captionscale.data.decode; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
