"""Crafted files whose checksums fit: a command ends with one line that names the fault, in little memory."""

import hashlib
import io
import json
import os
import shutil
import signal
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from experiment import peaked_run
from safetensors.torch import load_file, save, save_file

from captionscale.cli import main
from captionscale.data.manifest import MANIFEST
from captionscale.errors import UserError
from captionscale.model.encoders.weights import read
from captionscale.train.run_folder import CONFIG_FILE, MODEL_FILE, STATE_FILE, VOCAB_FILE

STEP = "step-00000001"
DEADLINE_S = 120
MOST_MB = 1000
DEEP = "[" * 100_000
Change = Callable[[Path, dict[str, Any]], object]


@pytest.fixture(scope="module")
def original(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return peaked_run(tmp_path_factory.mktemp("crafted"), packed)


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    """A copy of a run that a test may change."""
    return Path(shutil.copytree(original, tmp_path / "run", copy_function=os.link))


@pytest.fixture
def image(synthetic_coco: Path) -> Path:
    return min((synthetic_coco / "val2017").iterdir())


@pytest.fixture(autouse=True)
def deadline() -> Iterator[None]:
    """Let a command that hangs fail, and only its test."""

    def stop(*_: object) -> None:
        raise AssertionError("hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(DEADLINE_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def peak_mb() -> int:
    """Return the most memory that this process had since the last call."""
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Return the one line with which a command refuses what it was given."""
    capsys.readouterr()
    peak_mb()
    before = peak_mb()
    with pytest.raises(SystemExit) as left:
        main([*map(str, arguments)])
    assert peak_mb() - before < MOST_MB
    errors = capsys.readouterr().err.splitlines()
    (error,) = [line for line in errors if line.startswith("captionscale: ")]
    assert left.value.code == 1, error
    assert errors[-1] == error
    assert len(error) < 2000
    assert error.isprintable()
    return error


def reseal(run: Path, change: Change) -> None:
    """Change a checkpoint, and make its checksums fit again."""
    folder = run / "checkpoints" / STEP
    for path in folder.iterdir():
        if path.name != MODEL_FILE:
            own(path)
    state = json.loads((folder / STATE_FILE).read_text())
    change(folder, state)
    for name in state["sha256"] if isinstance(state["sha256"], dict) else ():
        if (folder / name).is_file():
            state["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / STATE_FILE).write_text(json.dumps(state))


def own(path: Path) -> Path:
    """Make a file that was linked one that may be changed."""
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)
    return path


def state(**changes: object) -> Change:
    return lambda _, facts: facts.update(changes)


def hashes(name: str) -> Change:
    return lambda _, facts: facts["sha256"].update({name: "0" * 64})


def fifo(folder: Path, _: dict[str, Any]) -> None:
    (folder / VOCAB_FILE).unlink()
    os.mkfifo(folder / VOCAB_FILE)


def words(change: Callable[[list[str]], object]) -> Change:
    def write(folder: Path, _: dict[str, Any]) -> None:
        known = json.loads((folder / VOCAB_FILE).read_text())["words"]
        (folder / VOCAB_FILE).write_text(json.dumps({"format": 1, "words": change(known)}))

    return write


def setting(line: str, other: str) -> Change:
    def write(folder: Path, _: dict[str, Any]) -> None:
        text = (folder / CONFIG_FILE).read_text()
        assert line in text
        (folder / CONFIG_FILE).write_text(text.replace(line, other))

    return write


def weights(data: bytes) -> Change:
    return lambda folder, _: own(folder / MODEL_FILE).write_bytes(data)


def header(tree: object, data: bytes = b"") -> Change:
    text = tree.encode() if isinstance(tree, str) else json.dumps(tree).encode()
    return weights(len(text).to_bytes(8, "little") + text + data)


def tensors(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def write(folder: Path, _: dict[str, Any]) -> None:
        found = load_file(folder / MODEL_FILE)
        (folder / MODEL_FILE).unlink()
        save_file({name: change(tensor).contiguous() for name, tensor in found.items()}, folder / MODEL_FILE)

    return write


CHECKPOINTS: dict[str, tuple[Change, str]] = {
    "a device": (hashes("/dev/zero"), "sha256 of '/dev/zero', which no checkpoint holds"),
    "another file": (hashes("../../../experiment.toml"), "which no checkpoint holds"),
    "a pipe": (fifo, "Not a regular file"),
    "no hashes": (state(sha256={}), "no sha256 of"),
    "a list of hashes": (state(sha256=[]), "Expected `object`, got `array`"),
    "a fingerprint that is a number": (state(fingerprint=3), "Expected `object`, got `int`"),
    "a fingerprint without end": (state(fingerprint={"seed": {"a": 1}}), "damaged checkpoint"),
    "a step that is text": (state(step="x"), "step: Expected `int`, got `str`"),
    "a step without end": (state(step=10**30), "step: Expected `int`"),
    "a step below 0": (state(step=-5), "step: Expected `int` >= 0"),
    "another step": (state(step=5), "every checkpoint is damaged"),
    "a best step to come": (state(best_step=7), "names steps after its own step 1"),
    "a loss scaler that is a number": (state(scaler=7), "scaler: Expected `object`, got `int`"),
    "numbers as words": (words(lambda known: [1] * len(known)), "no vocabulary (words[0]: Expected `str`"),
    "nothing as words": (words(lambda known: [None] * len(known)), "no vocabulary"),
    "lists as words": (words(lambda known: [[1]] * len(known)), "no vocabulary"),
    "a text as words": (words(lambda known: "a" * len(known)), "no vocabulary"),
    "no words": (words(lambda _: []), "no vocabulary (the first words are not <pad>"),
    "few words": (words(lambda known: known[:-3]), "tensors are not the model's"),
    "a word twice": (words(lambda known: [*known[:-1], known[-2]]), "a word occurs twice"),
    "a word that moves the cursor": (words(lambda known: [*known[:-1], "\x1b[2J"]), "is not a word"),
    "hidden 10^6": (setting("hidden_size = 16", "hidden_size = 1000000"), "less than or equal to 16384"),
    "hidden 10^4": (setting("hidden_size = 16", "hidden_size = 10000"), "tensors are not the model's"),
    "images of 20,000": (setting("image_size = 64", "image_size = 20000"), "less than or equal to 2048"),
    "10^9 words": (setting("max_words = 8", "max_words = 1000000000"), "less than or equal to 1000"),
    "a beam of 10^6": (setting("beam = 5", "beam = 1000000"), "less than or equal to 1000"),
    "10^5 layers": (setting("num_layers = 2", "num_layers = 100000"), "less than or equal to 64"),
    "64 layers": (setting("num_layers = 2", "num_layers = 64"), "tensors are not the model's"),
    "10^6 threads": (setting("workers = 1", "workers = 1000000"), "less than or equal to 1000"),
    "another encoder": (
        setting('name = "tiny_encoder:TinyEncoder"', 'name = "resnet152"'),
        "resnet152 has no part 'second'",
    ),
    "deep TOML": (setting("seed = 0", f"seed = {DEEP}"), "nested too deeply"),
    "a number of 5,000 digits": (setting("seed = 0", f"seed = {'9' * 5000}"), "not a TOML file"),
    "a number of 5,000 hex digits": (setting("seed = 0", f"seed = 0x{'f' * 5000}"), "thousands of digits"),
    "a path with NUL": (setting('shards = "', 'shards = "\\u0000'), "tring should match pattern"),
    "no tensors": (header({}), "tensors are not the model's"),
    "another tensor": (weights(save({"x": torch.zeros(1)})), "tensors are not the model's"),
    "a shape of 2^40": (
        header({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}, bytes(4)),
        "damaged checkpoint (model.safetensors:",
    ),
    "a tensor beyond the end": (
        header({"x": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}, bytes(4)),
        "damaged checkpoint (model.safetensors:",
    ),
    "a header beyond the end": (weights((2**62).to_bytes(8, "little") + bytes(99)), "a header of"),
    "a deep header": (header('{"x":' + DEEP), "damaged checkpoint (model.safetensors:"),
    "an empty file": (weights(b""), "a header of 0 bytes in a file of 0"),
    "numbers of 64 bits": (
        tensors(lambda it: it.double() if it.is_floating_point() else it),
        "found F64",
    ),
    "weights that are no numbers": (
        tensors(lambda it: it * float("nan") if it.is_floating_point() else it),
        "are NaN or infinite",
    ),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_crafted_checkpoint_is_refused(
    run: Path, image: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    change, expected = CHECKPOINTS[case]
    reseal(run, change)
    folder = run / "checkpoints" / STEP
    # As a folder from the hub is given, whose errors are not those of the run that holds it.
    place = run if case == "another step" else folder
    assert expected in refused(capsys, "caption", place, image)


@pytest.mark.parametrize("text", [DEEP, '{"format": ' + DEEP, "\xff", "[]", "3", "", '{"format": "1"}', "\0"])
def test_a_state_that_is_none_is_refused(
    run: Path, image: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    folder = run / "checkpoints" / STEP
    own(folder / STATE_FILE).write_text(text, encoding="latin-1")
    assert "damaged checkpoint" in refused(capsys, "caption", folder, image)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('cache = "a\\u0000b"', "path should have no control characters"),
        ("image_size = 0x" + "f" * 5000, "a number of thousands of digits"),
        ("crop_scale = " + "[" * 40 + "]" * 40, "data: crop_scale = [[["),
        ("max_words = 1e400", "max_words = inf"),
    ],
)
def test_a_crafted_config_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, expected: str
) -> None:
    path = tmp_path / "experiment.toml"
    path.write_text(f'[data]\nshards = "x"\n{text}\n')
    error = refused(capsys, "config", path)
    assert error.startswith(f"captionscale: {path}: ")
    assert expected in error


def rows(copy: Path, change: Callable[[np.ndarray], Any]) -> None:
    """Change the index of a packed folder's train split, and make its checksum fit again."""
    path = copy / "train.index.npy"
    changed = change(np.load(path))
    if not isinstance(changed, bytes):
        file = io.BytesIO()
        np.save(file, changed)
        changed = file.getvalue()
    path.write_bytes(changed)
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["splits"]["train"]["index_sha256"] = hashlib.sha256(changed).hexdigest()
    (copy / MANIFEST).write_text(json.dumps(manifest))


def value(column: str, number: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(index: np.ndarray) -> np.ndarray:
        index[column][5] = number
        return index

    return change


def npy(text: str, data: bytes = bytes(64)) -> Callable[[np.ndarray], bytes]:
    head = text.encode() + b"\n"
    return lambda _: b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + data


def header_of(index: np.ndarray, shape: str) -> str:
    return repr({"descr": index.dtype.descr, "fortran_order": False, "shape": (0,)}).replace("(0,)", shape)


INDEXES: dict[str, tuple[Callable[[np.ndarray], Any], str]] = {
    "shard -1": (value("shard", -1), "names train--0001.tar, but the manifest has 3 shards"),
    "shard 2^40": (value("shard", 2**40), "but the manifest has 3 shards"),
    "an image of 2^40 bytes": (value("image_size", 2**40), "expected it within train-00000.tar"),
    "an image of -1 bytes": (value("image_size", -1), "expected it within train-00000.tar"),
    "an image at 2^63 - 1": (value("image_offset", 2**63 - 1), "expected it within train-00000.tar"),
    "an image at -2^63": (value("image_offset", -(2**63)), "expected it within train-00000.tar"),
    "captions of 2^63 - 1 bytes": (value("json_size", 2**63 - 1), "expected it within train-00000.tar"),
    "captions below 0": (value("captions", -1), "-1 captions"),
    "image id -1": (value("image_id", -1), "image id -1, expected at least 0"),
    "a width of 2^62": (value("width", 2**62), "expected at least 1 x 1"),
    "shards out of order": (value("shard", 2), "expected them in order"),
    "an id twice": (lambda index: value("image_id", index["image_id"][4])(index), "is there again"),
    "two dimensions": (lambda index: index.reshape(2, 24), "expected (48,) in C order"),
    "Fortran order": (
        lambda index: np.asfortranarray(index.reshape(2, 24)),
        "in Fortran order",
    ),
    "no rows": (lambda index: index[:0], "0 images, manifest says 48"),
    "numbers": (lambda _: np.zeros(5), "columns None"),
    "more bytes than the manifest says": (lambda index: np.stack([index, index]), "expected at most 8,320"),
    "10^12 rows": (lambda index: npy(header_of(index, "(1000000000000,)"))(index), "rows of shape"),
    "-1 rows": (lambda index: npy(header_of(index, "(-1,)"))(index), "rows of shape (-1,)"),
    "a deep header": (npy("{'descr':" + "(" * 1500 + "'f8'" + ")" * 1500 + "}"), "not an index"),
    "no header": (lambda _: b"\x93NUMPY\x01\x00", "not an index"),
    "a later version": (lambda index: npy("")(index).replace(b"Y\x01", b"Y\x02"), "version (2, 0)"),
    "objects": (npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}"), "columns None"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_a_crafted_index_is_refused(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    copy = Path(shutil.copytree(packed, tmp_path / "shards"))
    change, expected = INDEXES[case]
    rows(copy, change)
    error = refused(capsys, "stats", copy)
    assert error.startswith(f"captionscale: {copy / 'train.index.npy'}: ")
    assert expected in error


def leave(text: str | None) -> Callable[[Path], object]:
    """Return what puts a text, or a pipe, at a path."""
    return lambda path: os.mkfifo(path) if text is None else path.write_text(text)


CONTENTS = {
    "a pipe": None,
    "brackets without end": DEEP,
    "a deep object": '{"a":' * 50_000,
    "one byte": "\x80",
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize(
    "command",
    [
        "config",
        "compare",
        "board",
        "score",
        "leaderboard",
        "coco",
        "karpathy",
        "jsonl",
        "csv",
        "tar",
        "stats",
        "profile",
    ],
)
def test_no_reader_hangs_or_stumbles(
    synthetic_coco: Path,
    packed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    content: str,
) -> None:
    name = {"config": "x.toml", "jsonl": "x.jsonl", "csv": "x.csv", "tar": "x.tar", "profile": "x.yaml"}.get(
        command, "x.json"
    )
    path, images, out = tmp_path / name, synthetic_coco / "val2017", tmp_path / "out"
    if command == "stats":
        path = Path(shutil.copytree(packed, tmp_path / "shards")) / MANIFEST
        path.unlink()
    text = CONTENTS[content]
    leave(text)(path)
    arguments: dict[str, list[object]] = {
        "config": ["config", path],
        "compare": ["compare", path, path],
        "board": ["board", path, "--out", tmp_path / "board.html"],
        "score": ["score", "--captions", path, "--references", path, "--out", tmp_path / "receipt.json"],
        "leaderboard": [
            *("leaderboard", "--eval-set", "nocaps-val", "--captions", path),
            *("--image-info", path, "--name", "x", "--out", out),
        ],
        "coco": ["pack", "coco", "--images", images, "--captions", path, "--split", "val", "--out", out],
        "karpathy": ["pack", "karpathy", "--images", images, "--captions", path, "--out", out],
        "jsonl": ["pack", "table", "--images", images, "--captions", path, "--out", out],
        "csv": ["pack", "table", "--images", images, "--captions", path, "--out", out],
        "tar": ["pack", "webdataset", "--tars", path, "--out", out],
        "stats": ["stats", path.parent],
        "profile": ["launch", "--profile", path, "--dry-run", "--", "train", "quickstart", "--out", out],
    }
    assert path.name in refused(capsys, *arguments[command])


def test_a_file_of_weights_larger_than_itself_is_refused(
    tmp_path: Path,
) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"fc.weight": torch.zeros(10_000_000)}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name))
    assert path.stat().st_size < 1_000_000
    with pytest.raises(UserError, match="not a file of weights"):
        read(path)
