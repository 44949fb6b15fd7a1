import gzip
import io
import json
import re
import subprocess
import tarfile
from contextlib import suppress
from random import Random

import pytest
from webdataset.tariterators import group_by_keys, tar_file_expander

from captionscale.data.sources import tars
from captionscale.data.sources.record import Record
from captionscale.errors import UserError


@pytest.fixture
def tar(tmp_path):
    """Write a tar of members in their order; a dict is JSON."""

    def make(name, members, form=tarfile.USTAR_FORMAT):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        with tarfile.open(path, "w", format=form) as file:
            for key, content in members if isinstance(members, list) else members.items():
                data = json.dumps(content).encode() if isinstance(content, dict) else content
                member = tarfile.TarInfo(key)
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))
        return path

    return make


def facts(records):
    return [(record.image_id, record.captions, record.read()) for record in records]


def sample(key, image, caption):
    """What img2dataset writes of one row."""
    meta = {
        "url": "http://x/y",
        "caption": caption,
        "key": key,
        "status": "success",
        "similarity": float("nan"),
    }
    return {f"{key}.jpg": image, f"{key}.json": meta, f"{key}.txt": (caption or "").encode()}


def test_what_img2dataset_writes_is_read_each_caption_once(tar):
    members = {
        **sample("000000000", b"one", "A dog. "),
        **sample("000000001", b"two", "Ein\nKätzchen"),
        "000000002.json": {"caption": "A lost one", "status": "failed_to_download"},
        "000000002.txt": b"A lost one",
        **sample("000000003", b"three", None),
        "00000_stats.json": {"count": 4},
    }
    path = tar("00000.tar", members)
    records = tars.read([path], "train", lambda _: 5)
    assert facts(records) == [(5, ("A dog.",), b"one"), (6, ("Ein\nKätzchen",), b"two")]
    assert records[0] == Record(5, "train", ("A dog.",), str(path), "000000000.jpg", 512, 3)


def test_half_a_character_becomes_a_question_mark(tar):
    path = tar("a.tar", {"\udce9.jpg": b"1", "\udce9.json": {"caption": "Kätzchen \ud83d"}})
    (record,) = tars.read([path], "train", lambda _: 1)
    assert (record.name, record.captions) == ("?.jpg", ("Kätzchen ?",))


def test_rows_of_one_image_are_joined_by_its_id_or_else_by_its_bytes(tar):
    rows = [(30, b"same", "a"), (4, b"same", "b"), (30, b"other", "c")]
    by_id = {
        f"{n}.{ending}": content
        for n, (image_id, data, caption) in enumerate(rows)
        for ending, content in (("jpg", data), ("json", {"image_id": image_id, "caption": caption}))
    }
    assert facts(tars.read([tar("a.tar", by_id)], "train", lambda _: 1)) == [
        (4, ("b",), b"same"),
        (30, ("a", "c"), b"same"),
    ]
    without = {key: {"caption": it["caption"]} if isinstance(it, dict) else it for key, it in by_id.items()}
    pair = [tar("b.tar", without), tar("c.tar", without)]
    assert facts(tars.read(pair, "train", lambda _: 1)) == [
        (1, ("a", "b") * 2, b"same"),
        (2, ("c",) * 2, b"other"),
    ]
    texts = {
        key: it | {"image_id": f"n{it['image_id']}"} if isinstance(it, dict) else it
        for key, it in by_id.items()
    }
    assert facts(tars.read([tar("d.tar", texts)], "train", lambda _: 1)) == [
        (1, ("a", "c"), b"same"),
        (2, ("b",), b"same"),
    ]


def test_our_own_shards_keep_their_ids_and_the_names_of_their_files(tar):
    path = tar(
        "shards/train-00000.tar",
        {
            "000000000030.json": {"image_id": 30, "file": "b.jpg", "captions": ["a", "b"]},
            "000000000030.png": b"image",
        },
    )
    (path.parent / "manifest.json").touch()
    (record,) = tars.read([path.parent], "train", lambda _: 1)
    assert (record.image_id, record.captions, record.name, record.place) == (
        30,
        ("a", "b"),
        "b.jpg",
        f"{path}: b.jpg",
    )
    tar("shards/val-00000.tar", {"1.jpg": b"x"})
    with pytest.raises(
        UserError, match=r"/shards: shards of the splits train, val; expected one split, or .*as in .*/tr"
    ):
        tars.read([path.parent], "train", lambda _: 1)
    assert len(tars.read([path], "train", lambda _: 1)) == 1


def test_keys_are_those_of_webdataset(tar):
    members = {
        "./a.b/x.y/img.JPG": b"1",
        "./a.b/x.y/img.txt": b"one",
        "dir/img.jpeg": b"2",
        "dir/img.seg.png": b"mask",
        "dir/img.txt": b"two",
        "__meta__/x.jpg": b"3",
        "__info__": b"4",
        "none": b"5",
        ".jpg": b"6",
        "img.webp": b"7",
        "img.txt": b"three",
    }
    path = tar("a.tar", members)
    with path.open("rb") as stream:
        samples = list(group_by_keys(tar_file_expander([{"url": "a.tar", "stream": stream}])))
    images = ("jpg", "jpeg", "webp")
    theirs = [(it[end], it["txt"].decode()) for it in samples for end in images if end in it and "txt" in it]
    ours = [(record.read(), record.captions[0]) for record in tars.read([path], "train", lambda _: 1)]
    assert ours == theirs == [(b"1", "one"), (b"2", "two"), (b"7", "three")]


def test_members_of_a_sample_may_lie_apart_and_names_be_long(tar):
    long = "sub/" * 60 + "ä"
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        path = tar(
            "a.tar", {f"{long}.jpg": b"1", "b.jpg": b"2", f"{long}.txt": b"one", "b.txt": b"two"}, form
        )
        assert facts(tars.read([path], "train", lambda _: 1)) == [(1, ("one",), b"1"), (2, ("two",), b"2")]


def test_what_gnu_tar_packs_is_read(tmp_path, touch, write):
    touch("i", "sub/1.jpg", "2.jpg")
    write("i/sub/1.txt", "one")
    write("i/sub/1.jpg", b"1")
    write("i/2.jpg", b"two")
    write("i/2.txt", "zwei")
    (tmp_path / "i" / "link.jpg").symlink_to("2.jpg")
    subprocess.run(["tar", "-cf", tmp_path / "a.tar", "-C", tmp_path / "i", "."], check=True)
    records = tars.read([tmp_path / "a.tar"], "train", lambda _: 1)
    assert sorted((record.captions, record.read()) for record in records) == [
        (("one",), b"1"),
        (("zwei",), b"two"),
    ]


def test_tars_of_a_folder_are_sorted_by_name_and_join_those_given(tar):
    names = [f"i/{letter}.tar" for letter in "hgfedcba"]
    for name in [*names, "i/._a.tar", "c.tar"]:
        path = tar(name, {"1.jpg": name.encode()})
    records = tars.read([path, path.parent / "i"], "test", lambda splits: 7 if splits == {"test"} else 0)
    in_order = ["c.tar", *reversed(names)]
    assert facts(records) == [(7 + n, (), name.encode()) for n, name in enumerate(in_order)]
    assert tars.find_tars([path.parent / "i"]) == [path.parent / name for name in in_order[1:]]


def test_images_with_empty_captions_are_skipped(tar):
    samples = {"1.jpg": b"1", "1.txt": b" ", "2.jpg": b"2", "2.json": {"caption": None}}
    assert facts(tars.read([tar("a.tar", samples)], "test", lambda _: 1)) == [(1, (), b"1"), (2, (), b"2")]
    samples |= {"3.jpg": b"3", "3.json": {"caption": ["a", " "], "captions": ["b"]}, "3.txt": b"a\n"}
    assert facts(tars.read([tar("b.tar", samples)], "test", lambda _: 1)) == [(1, ("b", "a"), b"3")]


FAULTS = {
    "an image without captions": (
        {"1.jpg": b"1", "1.txt": b"a", "2.jpg": b"2", "2.json": {"width": 3}},
        "a.tar: 2.jpg has no captions, others have; expected a .txt, or a .json with caption, with",
    ),
    "two images of one key": (
        {"1.jpg": b"1", "1.png": b"2", "1.txt": b"a"},
        "a.tar: 1.jpg and 1.png are of one sample; expected one image in each; write the tar again",
    ),
    "a text twice": (
        [("1.txt", b"a"), ("1.jpg", b"1"), ("1.txt", b"b")],
        "1.txt and 1.txt are of one sample; expected",
    ),
    "ids for some": (
        {"1.jpg": b"1", "1.json": {"image_id": 1, "caption": "a"}, "2.jpg": b"2", "2.txt": b"a"},
        "a.tar: image_id is a number in some .json or missing in some samples; expected a number in each",
    ),
    "a caption that is no text": (
        {"1.jpg": b"1", "1.json": {"caption": 1}},
        "a.tar: 1.json: caption: Expected `str",
    ),
    "an id below zero": (
        {"1.jpg": b"1", "1.json": {"image_id": -1}},
        "a.tar: 1.json: image_id: Expected `int` >= 0",
    ),
    "broken JSON": (
        {"1.jpg": b"1", "1.json": b"{"},
        "a.tar: 1.json: not JSON: Expecting property name enclosed",
    ),
    "JSON that is no object": (
        {"1.jpg": b"1", "1.json": b"[]"},
        "a.tar: 1.json: Expected `object`, got `array`; e",
    ),
    "brackets without end": (
        {"1.jpg": b"1", "1.json": b"[" * 100_000},
        "a.tar: 1.json: not JSON: nested too deeply",
    ),
    "a text that is not UTF-8": (
        {"1.jpg": b"1", "1.txt": b"caf\xe9"},
        "a.tar: 1.txt: byte 3 is not UTF-8; expected",
    ),
    "no image": ({"1.txt": b"a"}, "a.tar: no images; expected members such as 000000001.jpg; give the tars"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_tar_is_refused_with(tar, tmp_path, fault):
    members, words = FAULTS[fault]
    with pytest.raises(UserError, match=re.escape(words)) as refused:
        tars.read([tar("a.tar", members)], "train", lambda _: 1)
    assert str(refused.value).startswith(f"{tmp_path}/a.tar: ")
    assert str(refused.value).count(";") >= 2
    assert "\n" not in str(refused.value)


def test_a_tar_cut_short_anywhere_is_refused_with_the_byte(tar, tmp_path):
    whole = tar("a.tar", {"1.jpg": b"1" * 700, "1.txt": b"a", "2.jpg": b"2", "2.txt": b"b"}).read_bytes()
    end = 512 * 9
    assert whole[end:].strip(b"\0") == b""
    assert whole[end - 512 : end].strip(b"\0") == b"b"
    cut = tmp_path / "cut.tar"
    for size in (0, 1, 100, *range(511, end + 2, 511), *range(512, end + 1, 512)):
        cut.write_bytes(whole[:size])
        with pytest.raises(
            UserError, match=rf"cut.tar: damaged or cut short at byte [\d,]+ of {size:,}; expected a"
        ):
            tars.read([cut], "train", lambda _: 1)
    cut.write_bytes(whole[: end + 512])
    assert len(tars.read([cut], "train", lambda _: 1)) == 2


def test_no_damage_to_a_header_loses_a_sample_silently(tar):
    path = tar("a.tar", {f"{n}.{ending}": b"x%d" % n for n in range(3) for ending in ("jpg", "txt")})
    whole = path.read_bytes()
    for at in range(0, 6 * 1024, 37):
        if at % 1024 < 512:
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(UserError, match=r"a.tar: damaged or cut short at byte"):
                tars.read([path], "train", lambda _: 1)


@pytest.mark.parametrize("size", [b"\xff" * 10 + b"\xf8\x00", b"\x80" + b"\xff" * 11])
def test_a_size_below_zero_or_beyond_all_disks_is_refused(tar, size):
    path = tar("a.tar", {"1.jpg": b"1", "2.jpg": b"2"})
    whole = bytearray(path.read_bytes())
    member = tarfile.TarInfo("2.jpg")
    header = bytearray(member.tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    whole[1024:1536] = header
    path.write_bytes(whole)
    with pytest.raises(UserError, match=r"a.tar: damaged or cut short at byte"):
        tars.read([path], "train", lambda _: 1)


@pytest.mark.parametrize("name", ["i/a.tar.gz", "i/a.tgz", "i/a.tar"])
def test_a_compressed_tar_is_refused_and_so_is_a_folder_of_them(tar, tmp_path, name):
    data = tar("a.tar", {"1.jpg": b"1"}).read_bytes()
    path = tmp_path / name
    path.parent.mkdir()
    path.write_bytes(gzip.compress(data))
    for tars_given in ([path], [path.parent]):
        with pytest.raises(
            UserError, match=f"/{name}: compressed; expected a plain tar, .*; unpack it with gunzip"
        ):
            tars.read(tars_given, "train", lambda _: 1)


def test_files_that_are_no_tars_are_refused(tmp_path, write, touch):
    with pytest.raises(
        UserError, match=r"/a.tar: damaged or cut short at byte 0 of 15; expected a whole tar"
    ):
        tars.read([write("a.tar", "<html>404</html")], "train", lambda _: 1)
    with pytest.raises(
        UserError, match=r"/none.tar: No such file or directory; expected it to be readable; check"
    ):
        tars.read([tmp_path / "none.tar"], "train", lambda _: 1)
    with pytest.raises(UserError, match=r"/i: no tars; expected files .tar; check the path"):
        tars.read([touch("i", "a.txt")], "train", lambda _: 1)


def test_random_bytes_over_a_tar_never_show_a_traceback(tar):
    path = tar(
        "a.tar", {f"{n}.{e}": b"x%d" % n for n in range(2) for e in ("jpg", "txt")}, tarfile.PAX_FORMAT
    )
    long = tar("b.tar", {"ä" * 200 + ".jpg": b"1"}, tarfile.PAX_FORMAT).read_bytes()
    chance = Random(1)
    for whole in (path.read_bytes()[:4096], long[:4096]):
        for _ in range(300):
            data = bytearray(whole)
            for _ in range(chance.choice([1, 3, 30])):
                data[chance.randrange(len(data))] = chance.randrange(256)
            path.write_bytes(data + bytes(1024))
            with suppress(UserError):
                tars.read([path], "train", lambda _: 1)
