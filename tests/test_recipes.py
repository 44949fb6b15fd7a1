"""The recipes in shards/, run for real on miniature zips in the true layouts from a server of our own."""

import fcntl
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sysconfig
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SHARDS = Path(__file__).parents[1] / "shards"
URLS = ("COCO_URL", "FLICKR8K_URL", "KARPATHY_URL")
# As the data sets' authors give them.
PUBLISHED = {
    "coco2014": {"train": 82_783, "val": 40_504, "test": 40_775},
    "coco2017": {"train": 118_287, "val": 5_000, "test": 40_670},
    "karpathy": {"train": 113_287, "val": 5_000, "test": 5_000},
    "flickr8k": {"train": 6_000, "val": 1_000, "test": 1_000},
    "flickr30k": {"train": 29_000, "val": 1_014, "test": 1_000},
}

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        None in map(shutil.which, ("bash", "curl", "unzip")), reason="the recipes need bash, curl and unzip"
    ),
]


class Mirror(ThreadingHTTPServer):
    """Serves zips; remembers where each download started, and breaks off where it is told to."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.files: dict[str, bytes] = {}
        self.downloads: list[tuple[str, int]] = []
        self.asked = 0
        self.claimed_too_many = 0
        self.ranges = True
        self.break_after: dict[str, list[int]] = {}
        self.hang_after: dict[str, int] = {}
        self.let_go = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Answer(BaseHTTPRequestHandler):
    server: Mirror

    def do_HEAD(self) -> None:
        self.server.asked += 1
        self._start(0, self.server.claimed_too_many)

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked and self.server.ranges else 0
        self.server.downloads.append((name, start))
        data = self._start(start)
        hang, breaks = self.server.hang_after.pop(name, None), self.server.break_after.get(name)
        try:
            self.wfile.write(data[start : hang or (breaks.pop(0) if breaks else None)])
            if hang:
                self.server.let_go.wait(20)
        except ConnectionError:
            pass

    def _start(self, start: int, surplus: int = 0) -> bytes:
        data = self.server.files.get(self.path)
        if data is None:
            self.send_error(404)
            return b""
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start + surplus))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        return data

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    with Mirror() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.let_go.set()
        server.shutdown()
        thread.join()


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as out:
        for name, data in files.items():
            out.writestr(name, data)
    return buffer.getvalue()


def jpeg_image(number: int) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(number).integers(0, 256, (48, 64, 3), np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()


def coco_captions(split: str, ids: range, captioned: bool = True) -> bytes:
    document: dict[str, object] = {
        "images": [{"id": it, "file_name": f"COCO_{split}_{it:012}.jpg"} for it in ids]
    }
    if captioned:
        document["annotations"] = [
            {"id": 10 * it + k, "image_id": it, "caption": f"caption {k} of {it}"}
            for it in ids
            for k in (1, 2)
        ]
    return json.dumps(document).encode()


def coco(mirror: Mirror) -> None:
    """Put COCO 2014 on the server: 4 images of train, 3 of val, 2 of test, where 22 is the 1 of train."""
    ids = {"train2014": range(1, 5), "val2014": range(11, 14), "test2014": range(21, 23)}
    for split, its in ids.items():
        folder = {f"{split}/": b""} | {
            f"{split}/COCO_{split}_{it:012}.jpg": jpeg_image(it % 21) for it in its
        }
        mirror.files[f"/zips/{split}.zip"] = zipped(folder)
    captions = {split: coco_captions(split, its, split != "test2014") for split, its in ids.items()}
    annotations = {
        f"annotations/captions_{split}.json": captions[split] for split in ("train2014", "val2014")
    }
    mirror.files["/annotations/annotations_trainval2014.zip"] = zipped(
        annotations | {"annotations/instances_train2014.json": b"{}"}
    )
    mirror.files["/annotations/image_info_test2014.zip"] = zipped(
        {"annotations/image_info_test2014.json": captions["test2014"]}
    )


def karpathy(dataset: str, splits: dict[str, list[str]]) -> bytes:
    """Return Karpathy's JSON file of images by split, each a path."""
    images = []
    for split, paths in splits.items():
        for path in paths:
            folder, _, name = path.rpartition("/")
            place = {"filepath": folder, "cocoid": int(name[-16:-4])} if folder else {}
            images.append(
                place | {"filename": name, "split": split, "sentences": [{"raw": f"a caption of {name}"}]}
            )
    return json.dumps({"dataset": dataset, "images": images}).encode()


def environment(mirror: Mirror) -> dict[str, str]:
    path = f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"
    return os.environ | dict.fromkeys(URLS, mirror.url) | {"PATH": path, "NO_PROXY": "*"}


def run(
    mirror: Mirror, recipe: str, raw: Path, out: Path, *options: str, folder: Path = SHARDS, **changes: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", folder / f"{recipe}.sh", raw, out, *options],
        env=environment(mirror) | changes, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """Return the last line of a call that failed as it should."""
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


def wait_for_lock(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.close(descriptor)


def expect(**splits: int) -> list[str]:
    return [word for split, images in splits.items() for word in ("--expect", f"{split}={images}")]


def test_coco_comes_over_a_broken_line_and_a_second_run_has_nothing_to_do(
    mirror: Mirror, tmp_path: Path
) -> None:
    raw, out = tmp_path / "raw of all", tmp_path / "out"
    coco(mirror)
    # More often than a download without any progress is tried.
    breaks = list(range(1000, 8000, 1000))
    mirror.break_after["train2014.zip"] = breaks.copy()
    raw.mkdir()
    (raw / "val2014.zip.part").write_bytes(bytes(len(mirror.files["/zips/val2014.zip"]) + 1))
    options = [*expect(train=4, val=3), "--expect=test=2", "--images-per-shard", "3"]
    done = run(mirror, "coco2014", raw, out, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"{out}: train: 4 images, 8 captions",
        f"{out}: val: 3 images, 6 captions",
        f"{out}: test: 2 images, 0 captions",
        f"{out}: as packed: images: train 4, val 3, test 2",
    ]
    assert re.match(r"coco2014.sh: 1 MB to download and about 1 MB to unpack into .*raw of all", done.stderr)
    assert [start for name, start in mirror.downloads if name == "train2014.zip"] == [0, *breaks]
    assert [start for name, start in mirror.downloads if name == "val2014.zip"] == [0]
    assert "note: image 1 of split 'train' and image 22 of split 'test' are the same bytes" in done.stderr
    assert not list(raw.glob(".unpacking")) + list(raw.glob("*.part"))
    # What nothing needs was not unpacked.
    assert not (raw / "annotations" / "instances_train2014.json").exists()

    for zip_file in raw.glob("*.zip"):
        zip_file.unlink()
    asked, written = mirror.asked, {path: path.stat().st_mtime_ns for path in out.glob("[!.]*")}
    again = run(mirror, "coco2014", raw, out, *options)
    assert (again.returncode, again.stdout) == (0, done.stdout)
    assert mirror.asked == asked
    assert "download" not in again.stderr
    assert {path: path.stat().st_mtime_ns for path in out.glob("[!.]*")} == written

    said = refused(run(mirror, "coco2014", raw, tmp_path / "other", *expect(val=3)))
    assert "split 'train' has 4 images, expected 82,783" in said


def test_flickr8k_goes_on_where_it_was_killed(mirror: Mirror, tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    names = {
        split: [f"{10 * k + it}_ab.jpg" for it in range(3 - k)]
        for k, split in enumerate(("train", "dev", "test"))
    }
    every = [name for group in names.values() for name in group]
    images = {f"Flicker8k_Dataset/{name}": jpeg_image(k) for k, name in enumerate(every)}
    mirror.files["/Flickr8k_Dataset.zip"] = zipped(
        images | {f"__MACOSX/Flicker8k_Dataset/._{name}": b"finder" for name in every}
    )
    captions = "".join(f"{name}#{k}\ta caption of {name} .\n" for name in every for k in range(5))
    lists = {f"Flickr_8k.{split}Images.txt": "\n".join(group).encode() for split, group in names.items()}
    text = lists | {
        "Flickr8k.token.txt": captions.encode(),
        "Flickr8k.lemma.token.txt": b"",
        "readme.txt": b"",
    }
    mirror.files["/Flickr8k_text.zip"] = zipped(text)

    mirror.hang_after["Flickr8k_Dataset.zip"] = 10_000
    part = raw / "Flickr8k_Dataset.zip.part"
    first = subprocess.Popen(
        ["bash", SHARDS / "flickr8k.sh", raw, out],
        env=environment(mirror), start_new_session=True, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 600
        while not part.exists() or not part.stat().st_size:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        if shutil.which("flock"):
            # Its curl lives on, and two of them would spoil the file.
            os.kill(first.pid, signal.SIGKILL)
            first.wait()
            assert "another recipe is at work" in refused(run(mirror, "flickr8k", raw, out))
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    wait_for_lock(raw)
    had = part.stat().st_size
    # The next to be killed was at its unzip, and the text's zip was copied by hand, cut short.
    (raw / ".unpacking" / "Flicker8k_Dataset").mkdir(parents=True)
    (raw / ".unpacking" / "Flicker8k_Dataset" / "half.jpg").write_bytes(b"\xff\xd8")
    cut = raw / "Flickr8k_text.zip"
    cut.write_bytes(mirror.files["/Flickr8k_text.zip"][:-100])
    said = refused(run(mirror, "flickr8k", raw, out))
    assert re.search(r"Flickr8k_text.zip: unzip's status is \d+, expected a whole zip that holds", said)
    assert [start for name, start in mirror.downloads if name == "Flickr8k_Dataset.zip"] == [0, had]
    assert {path.name for path in (raw / "Flicker8k_Dataset").iterdir()} == set(every)

    cut.unlink()
    said = refused(run(mirror, "flickr8k", raw, out))
    for split, found, expected in (("train", 3, "6,000"), ("val", 2, "1,000"), ("test", 1, "1,000")):
        assert f"split '{split}' has {found} images, expected {expected}" in said
    done = run(mirror, "flickr8k", raw, out, *expect(train=3, val=2, test=1))
    assert done.stdout.splitlines()[-1] == f"{out}: as packed: images: train 3, val 2, test 1", done.stderr


def test_karpathys_split_is_the_same_from_his_file_and_from_the_lists(mirror: Mirror, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    coco(mirror)
    totals = expect(train=5, val=1, test=1)
    said = refused(run(mirror, "karpathy", raw, tmp_path / "none"))
    assert re.search(
        r"caption_datasets.zip: curl: \(22\) .*404, expected dataset_coco.json from there; .*karpathy.sh",
        said,
    )
    assert mirror.downloads == []

    raw.mkdir(exist_ok=True)
    (raw / "karpathy_val_images.txt").write_text("val2014/COCO_val2014_000000000011.jpg 11\n")
    (raw / "karpathy_test_images.txt").write_text("val2014/COCO_val2014_000000000012.jpg 12\n")
    by_lists = run(mirror, "karpathy", raw, tmp_path / "lists", *totals)
    assert by_lists.returncode == 0, by_lists.stderr

    paths = {
        split: [f"{split}2014/COCO_{split}2014_{it:012}.jpg" for it in ids]
        for split, ids in (("train", range(1, 5)), ("val", range(11, 14)))
    }
    by_split = {
        "test": paths["val"][1:2],
        "restval": paths["val"][2:],
        "train": paths["train"],
        "val": paths["val"][:1],
    }
    (raw / "dataset_coco.json").write_bytes(karpathy("coco", by_split))
    # His own file says more than the lists, which are not looked at any more.
    for path in raw.glob("karpathy_*"):
        path.write_text("spoilt")
    by_file = run(mirror, "karpathy", raw, tmp_path / "file", *totals)
    assert by_file.returncode == 0, by_file.stderr
    assert (
        by_file.stdout.splitlines()[-1] == f"{tmp_path / 'file'}: as packed: images: train 5, val 1, test 1"
    )
    for split in ("train", "val", "test"):
        ids = [np.load(tmp_path / way / f"{split}.index.npy")["image_id"] for way in ("lists", "file")]
        np.testing.assert_array_equal(*ids)


def test_flickr30k_says_where_its_images_must_lie_and_needs_no_server_with_ranges(
    mirror: Mirror, tmp_path: Path
) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    said = refused(run(mirror, "flickr30k", raw, out))
    assert "raw/flickr30k-images: no such folder, expected the images; " in said
    (raw / "flickr30k-images").mkdir(parents=True)
    names = [f"{k}.jpg" for k in range(4)]
    for k, name in enumerate(names):
        (raw / "flickr30k-images" / name).write_bytes(jpeg_image(k))
    splits = {"train": names[:2], "val": names[2:3], "test": names[3:]}
    mirror.files["/caption_datasets.zip"] = zipped({"dataset_flickr30k.json": karpathy("flickr30k", splits)})
    mirror.ranges = False
    (raw / "caption_datasets.zip.part").write_bytes(b"left by an earlier call")
    done = run(mirror, "flickr30k", raw, out, *expect(train=2, val=1, test=1))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{out}: as packed: images: train 2, val 1, test 1"


def test_a_download_that_gets_nowhere_is_given_up(mirror: Mirror, tmp_path: Path) -> None:
    (tmp_path / "flickr30k-images").mkdir()
    mirror.files["/caption_datasets.zip"] = zipped({"dataset_flickr30k.json": b"{}"})
    mirror.claimed_too_many = 3
    said = refused(run(mirror, "flickr30k", tmp_path, tmp_path / "out"))
    whole = len(mirror.files["/caption_datasets.zip"])
    assert len(mirror.downloads) == 5
    assert f"stopped after {whole} of {whole + 3} bytes, expected all; run the same command again" in said


def test_what_a_user_can_mend_is_told_in_one_line(mirror: Mirror, tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    images = raw / "flickr30k-images"
    images.mkdir(parents=True)
    copy = tmp_path / "shards"
    shutil.copytree(SHARDS, copy)
    tools = tmp_path / "tools"
    tools.mkdir()
    names = "awk bash cat curl df dirname flock grep mkdir mv rm sed sleep tail unzip wc"
    for name in names.split():
        if found := shutil.which(name):
            (tools / name).symlink_to(found)

    def say(**changes: str) -> str:
        done = run(mirror, "flickr30k", raw, out, folder=copy, **changes)
        # What is downloaded, that it is, what is unpacked, and the error.
        assert len(done.stderr.splitlines()) <= 4
        return refused(done)

    assert "no command captionscale, expected it on the PATH" in say(PATH=str(tools))
    (tools / "captionscale").symlink_to(Path(sysconfig.get_path("scripts")) / "captionscale")
    (tools / "unzip").unlink()
    assert "no command unzip, expected it for what" in say(PATH=str(tools))
    assert re.search(
        r"curl: \(7\) .*; check the network, or put it into", say(KARPATHY_URL="http://127.0.0.1:9")
    )
    assert "/none: cannot be written to, expected it for train2014 " in refused(
        run(mirror, "coco2014", Path("/dev/null/none"), out)
    )
    mirror.files["/caption_datasets.zip"] = b""
    assert "does not say how many bytes it has" in say()
    mirror.claimed_too_many = 10**17
    assert "too little space" in say()
    mirror.claimed_too_many = 0
    mirror.files["/caption_datasets.zip"] = zipped({"dataset_coco.json": b"{}"})
    assert "unzip's status is 11, expected a whole zip that holds dataset_flickr30k.json" in say()
    (raw / "caption_datasets.zip").write_bytes(b"<html>Log in to the hotel's network</html>")
    assert "unzip's status is 9, expected a whole zip" in say()
    (raw / "dataset_flickr30k.json").write_text("{}")
    assert "expected Karpathy's layout" in say()


@pytest.mark.parametrize("words", [[], ["raw"], ["--help"], ["raw", "--workers", "2"]], ids=" ".join)
def test_a_call_without_two_folders_is_told_how_it_should_be(words: list[str]) -> None:
    done = subprocess.run(
        ["bash", SHARDS / "karpathy.sh", *words], capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 2
    assert done.stderr.startswith("COCO by Karpathy's split")
    assert "\n    bash karpathy.sh RAW OUT [options of captionscale pack ...]\n" in done.stderr
    assert "shellcheck" not in done.stderr


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_every_split_is_packed_only_with_its_published_number_of_images(recipe: str) -> None:
    text = (SHARDS / f"{recipe}.sh").read_text()
    found = re.findall(r"(?:--expect |pack_coco )(train|val|test)[= ](\d+) *", text.partition("\n\n")[2])
    assert {split: int(images) for split, images in found} == PUBLISHED[recipe]


def test_every_recipe_is_tested() -> None:
    assert {path.stem for path in SHARDS.glob("*.sh")} == {"recipe", *PUBLISHED}


def test_coco_2017_is_done_as_coco_2014() -> None:
    older, newer = ((SHARDS / f"coco{year}.sh").read_text() for year in (2014, 2017))
    for split in ("train", "val", "test"):
        older = older.replace(str(PUBLISHED["coco2014"][split]), str(PUBLISHED["coco2017"][split]))
    assert older.replace("2014", "2017") == newer
