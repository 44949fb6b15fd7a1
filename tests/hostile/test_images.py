"""Image files that are small and would take a decoder minutes, or gigabytes."""

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from captionscale.data import image_limits
from captionscale.data.decode import FORMATS, decode_image, image_info, pil_to_rgb
from captionscale.errors import UserError


def lazily(data: bytes) -> Any:
    return pil_to_rgb(Image.open(io.BytesIO(data), formats=FORMATS))


READS: list[Callable[[bytes, str], Any]] = [
    decode_image,
    lambda data, place: image_info(data, place, full_decode=True),
    lambda data, place: image_info(data, place, full_decode=False),
]


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(mode: str, width: int, height: int) -> Image.Image:
    draw = np.random.default_rng(0)
    channels = {"L": 1, "RGB": 3, "CMYK": 4}[mode]
    found = draw.integers(256, size=(height, width, channels), dtype=np.uint8)
    return Image.fromarray(found.squeeze(), mode) if mode == "CMYK" else Image.fromarray(found.squeeze())


def last_scan(jpeg: bytes) -> bytes:
    return jpeg[jpeg.rindex(b"\xff\xda") : -2]


def with_scans(mode: str, width: int, height: int, scans: int) -> bytes:
    """Return a progressive JPEG whose last scan is there again and again."""
    jpeg = encode(Image.new(mode, (width, height)), "JPEG", progressive=True)
    return jpeg[:-2] + last_scan(jpeg) * scans + jpeg[-2:]


def segment(marker: int, data: bytes) -> bytes:
    return bytes([255, marker]) + struct.pack(">H", len(data) + 2) + data


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def directory(entries: int, size: int) -> bytes:
    """Return a TIFF directory whose entries all name the same bytes."""
    rows = b"".join(struct.pack("<HHII", tag, 3, size // 2, 8) for tag in range(entries))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", entries) + rows + bytes(size)


JPEG = encode(noise("RGB", 40, 30), "JPEG")
PNG = encode(noise("RGB", 40, 30), "PNG")
GIF = encode(noise("L", 40, 30), "GIF")
# Where each file's own parts begin: behind JFIF's segment, the header's chunk, the palette.
AFTER_JFIF, AFTER_IHDR, AFTER_PALETTE = 20, 33, 13 + 3 * 256


def in_jpeg(parts: bytes) -> bytes:
    return JPEG[:AFTER_JFIF] + parts + JPEG[AFTER_JFIF:]


def in_png(parts: bytes) -> bytes:
    return PNG[:AFTER_IHDR] + parts + PNG[AFTER_IHDR:]


def in_gif(parts: bytes) -> bytes:
    return GIF[:AFTER_PALETTE] + parts + GIF[AFTER_PALETTE:]


def rle(width: int, height: int, code: bytes, compression: int = 1) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, compression, len(code), 0, 0, 256, 0)
    palette = bytes(range(256)) * 4
    return b"BM" + struct.pack("<IHHI", 1078 + len(code), 0, 0, 1078) + header + palette + code


BOMBS = {
    # Each scan is a pass over the whole image: 2,000 of them took 8.4 s.
    "scans in RGB": (with_scans("RGB", 64, 64, 500), "more than 500 scans"),
    "scans in CMYK": (with_scans("CMYK", 64, 64, 500), "more than 500 scans"),
    "scans in grey": (with_scans("L", 64, 64, 500), "more than 500 scans"),
    "scans in a large image": (with_scans("CMYK", 3000, 3000, 230), "more than 222 scans"),
    "scans behind what looks like the end": (
        with_scans("CMYK", 64, 64, 500).replace(b"\xff\xda", segment(0xE5, b"\xff\xd9") + b"\xff\xda"),
        "more than 500 scans",
    ),
    "scans behind markers that libjpeg passes over": (
        with_scans("CMYK", 64, 64, 500).replace(b"\xff\xda", b"\xff\x05\xff\xff\xff\xd3\xff\xff\xda"),
        "scans|marker",
    ),
    "arithmetic coding": (JPEG.replace(b"\xff\xc0", b"\xff\xc9"), "arithmetic-coded"),
    "lossless JPEG": (JPEG.replace(b"\xff\xc0", b"\xff\xc3"), "lossless"),
    # Pillow appends each to those before it, and keeps all.
    "JPEG segments": (in_jpeg(segment(0xE5, b"") * 2000), "more than 1,000 parts"),
    "JPEG comments": (in_jpeg(segment(0xFE, b"") * 2000), "more than 1,000 parts"),
    "JPEG fill bytes": (in_jpeg(b"\xff" * 2000), "more than 1,000 parts"),
    "JPEG junk": (in_jpeg(b"\0" * 2000), "more than 1,000 parts"),
    "JPEG metadata": (in_jpeg(segment(0xE5, bytes(65000)) * 300), "bytes of metadata"),
    "JPEG marker without a length": (in_jpeg(b"\xff\xf0\xff\xff"), "JPEG marker 0xf0"),
    # Pillow reads the values when it opens the file: 60 kB became 160 MB, and an index of MPO 700 MB.
    "EXIF values": (
        JPEG[:2] + segment(0xE1, b"Exif\0\0" + directory(2000, 30000)) + JPEG[AFTER_JFIF:],
        "EXIF values",
    ),
    "EXIF in two segments": (
        JPEG[:2]
        + segment(0xE1, b"Exif\0\0" + directory(2000, 20000)[:30000])
        + segment(0xE1, b"Exif\0\0" + directory(2000, 20000)[30000:])
        + JPEG[AFTER_JFIF:],
        "EXIF values",
    ),
    "MPO index": (in_jpeg(segment(0xE2, b"MPF\0" + directory(2000, 30000))), "EXIF values"),
    "PNG profiles": (
        in_png(chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(1000))) * 1001),
        "more than 1,000 parts",
    ),
    "PNG chunks": (in_png(chunk(b"IDAT", b"") * 100_000), "more than 100,000 chunks"),
    "PNG metadata": (in_png(chunk(b"prVt", bytes(17 << 20))), "bytes of metadata"),
    # Quadratic: 20 MB of comments took a minute.
    "GIF comments": (in_gif(b"!\xfe" + (b"\x01x") * 10_001 + b"\0"), "before the first frame"),
    "GIF empty comments": (in_gif(b"!\xfe\0" * 10_001), "before the first frame"),
    "GIF blocks behind an empty one": (
        in_gif(b"!\x01\0" + b"\x01x" * 10_001 + b"\0"),
        "before the first frame",
    ),
    "GIF blocks behind a loop": (
        in_gif(b"!\xff\x0bNETSCAPE2.0\0" + b"\x01x" * 10_001 + b"\0"),
        "before the first frame",
    ),
    "GIF junk": (in_gif(bytes(10_001)), "before the first frame"),
    # Python code fills each line byte by byte, and one delta was to skip 255 lines of 89 megapixels.
    "BMP lines": (rle(9000, 9000, b"\x01\x05\0\0" * 9000), "run-length encoded"),
    "BMP delta": (rle(89_000_000, 1, b"\0\2\0\xff"), "run-length encoded"),
    "BMP of 4 bits": (rle(9000, 9000, b"", 2), "run-length encoded"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_that_would_take_long_is_refused_before_it_is_decoded(name: str) -> None:
    bomb, reason = BOMBS[name]
    for read in READS:
        with pytest.raises(UserError, match=rf"^here: not a readable image \(.*({reason})"):
            read(bomb, "here")


@pytest.mark.parametrize("name", ["scans in RGB", "scans in CMYK", "BMP lines"])
def test_what_pillow_has_opened_but_not_decoded_is_held_to_the_same_limits(name: str) -> None:
    bomb, reason = BOMBS[name]
    with pytest.raises(UserError, match=reason):
        lazily(bomb)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("scans", [0, 400])
def test_a_progressive_jpeg_with_many_scans_passes(mode: str, scans: int) -> None:
    data = with_scans(mode, 64, 48, scans)
    for read in READS:
        read(data, "here")
    assert lazily(data).shape == (48, 64, 3)


def test_the_scans_of_encoders_pass_in_the_largest_image() -> None:
    # CMYK has the most scans, eighteen; the pixels of 89 megapixels would take a second.
    whole = encode(noise("CMYK", 64, 48), "JPEG", progressive=True)
    assert whole.count(b"\xff\xda") == 18
    at = whole.index(b"\xff\xc2") + 5
    image_limits.check_image(whole[:at] + struct.pack(">HH", 9450, 9450) + whole[at + 4 :])


def test_what_is_behind_a_jpeg_or_in_its_metadata_is_not_counted_as_scans() -> None:
    # A phone appends a film of megabytes, and EXIF holds a thumbnail.
    many = b"\xff\xda" * 600
    for data in (JPEG + many, in_jpeg(segment(0xE5, many)), in_jpeg(segment(0xE5, b"\xff\xd9" + many))):
        np.testing.assert_array_equal(decode_image(data, "here"), decode_image(JPEG, "here"))
        assert image_info(data, "here", full_decode=True) == image_info(JPEG, "here", full_decode=True)


def test_the_metadata_that_cameras_and_editors_write_passes() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description" * 2000
    for kind, options in (
        ("JPEG", {"exif": exif, "icc_profile": bytes(3_000_000), "comment": "x" * 60_000}),
        ("PNG", {"exif": exif, "icc_profile": bytes(900_000)}),
        ("WEBP", {"exif": exif, "icc_profile": bytes(900_000)}),
    ):
        data = encode(noise("RGB", 40, 30), kind, **options)
        assert decode_image(data, "here").shape == (40, 30, 3)
        assert image_info(data, "here", full_decode=False)[:2] == (30, 40)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_exif_whose_values_overlap_costs_no_image_and_no_memory(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encode(noise("RGB", 40, 30), kind, exif=b"Exif\0\0" + directory(3000, 60_000))
    read: list[int] = []
    monkeypatch.setattr(Image.Exif, "load", lambda _, exif: read.append(len(exif)))
    assert decode_image(data, "here").shape == (30, 40, 3)
    assert not read


def test_a_raw_profile_whose_values_overlap_costs_no_image_and_no_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = b"Raw profile type exif\0\nexif\n1\n" + directory(3000, 60_000).hex().encode()
    read: list[int] = []
    monkeypatch.setattr(Image.Exif, "load", lambda _, exif: read.append(len(exif)))
    assert decode_image(in_png(chunk(b"tEXt", text)), "here").shape == (30, 40, 3)
    assert not read


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "MPO"])
def test_of_thousands_of_frames_one_is_decoded(kind: str) -> None:
    others = [Image.new("RGB", (16, 12), (number % 250, number // 250, 0)) for number in range(1000)]
    first = Image.new("RGB", (16, 12), (200, 30, 60))
    data = encode(first, kind, save_all=True, append_images=others)
    assert np.abs(decode_image(data, "here").astype(int) - np.asarray(first, int)).max() < 8


def test_a_canvas_of_gigapixels_is_refused_before_memory_is_asked_for() -> None:
    frames = [noise("RGB", 16, 12), noise("RGB", 12, 16).resize((16, 12))]
    data = bytearray(encode(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    assert data[12:16] == b"VP8X"
    data[24:30] = b"\xff\xff\0\xff\xff\0"
    for read in READS:
        with pytest.raises(UserError, match=r"^here: more than [\d,]+ pixels"):
            read(bytes(data), "here")
