"""Mutations of files: of what they say in their format, of their bytes, and of what they are."""

import csv
import io
import json
import os
import pickle
import struct
import tarfile
import tomllib
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import yaml
from fuzz_mutations import CANARY, NUMBERS, PATHS, Pickled, mutate_bytes, mutate_tree, nasty


def mutate_file(rng: Random, path: Path) -> str:
    """Change a file by its format, its bytes, or put something else in its place; return what was changed."""
    chance = rng.random()
    if chance < 0.05:
        return _replace(rng, path)
    data = path.read_bytes()
    found, change = None, ""
    if chance < 0.65:
        try:
            found, change = _FORMATS.get(path.suffix, _json)(rng, data)
        except (ValueError, IndexError, KeyError, TypeError, OverflowError, RecursionError):
            change = ""
    if found is None:
        found, change = mutate_bytes(rng, data)
    # It may be a hard link to a file that other cases read.
    path.unlink()
    path.write_bytes(found)
    return change


def _replace(rng: Random, path: Path) -> str:
    """Put something else in a file's place."""
    change = rng.choice(
        ("missing", "folder", "FIFO", "loop", "/dev/zero", "/dev/full", "dangling link", "huge")
    )
    path.unlink()
    if change == "folder":
        path.mkdir()
    elif change == "FIFO":
        os.mkfifo(path)
    elif change == "huge":
        with path.open("wb") as file:
            file.truncate(1 << 42)
    elif change != "missing":
        path.symlink_to({"loop": path.name, "dangling link": "nowhere"}.get(change, change))
    return change


def _dumps(tree: Any) -> bytes:
    return json.dumps(tree, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _json(rng: Random, data: bytes) -> tuple[bytes, str]:
    tree, change = mutate_tree(rng, json.loads(data))
    return _dumps(tree), change


def _json_lines(rng: Random, data: bytes) -> tuple[bytes, str]:
    tree, change = mutate_tree(rng, [json.loads(line) for line in data.splitlines()])
    return b"".join(_dumps(line) + b"\n" for line in (tree if isinstance(tree, list) else [tree])), change


def _toml(rng: Random, data: bytes) -> tuple[bytes, str]:
    tree, change = mutate_tree(rng, tomllib.loads(data.decode()))
    tree = tree if isinstance(tree, dict) else {"x": tree}
    tables = {key: value for key, value in tree.items() if isinstance(value, dict)}
    lines = [f"{_quoted(key)} = {_value(value)}" for key, value in tree.items() if key not in tables]
    for name, table in tables.items():
        lines += [
            f"[{_quoted(name)}]",
            *(f"{_quoted(key)} = {_value(value)}" for key, value in table.items()),
        ]
    return "\n".join(lines).encode("utf-8", "surrogatepass"), change


def _value(value: Any) -> str:
    """Return a value in TOML, which has no null."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_quoted(key)} = {_value(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return _quoted(value) if isinstance(value, str) else str(value).lower()


def _quoted(text: str) -> str:
    return json.dumps(text)


def _yaml(rng: Random, data: bytes) -> tuple[bytes, str]:
    if rng.random() < 0.2:
        bomb = b"a: &a [x]\n" + b"".join(
            b"%c: &%c [%s]\n" % (n, n, b", ".join([b"*%c" % (n - 1)] * 9)) for n in range(98, 110)
        )
        run = f'num_processes: !!python/object/apply:os.mkdir ["{CANARY}"]\n'.encode()
        return rng.choice(
            (bomb, run, b"&a [*a]", b"num_processes: 99999999999999\nuse_cpu: true\n")
        ), "crafted"
    tree, change = mutate_tree(rng, yaml.safe_load(data))
    return yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass"), change


def _table(rng: Random, data: bytes) -> tuple[bytes, str]:
    tree, change = mutate_tree(rng, list(csv.reader(data.decode().splitlines())))
    out = io.StringIO()
    csv.writer(out).writerows(row if isinstance(row, list) else [row] for row in tree)
    return out.getvalue().encode("utf-8", "surrogatepass"), change


def _npy(rng: Random, data: bytes) -> tuple[bytes, str]:
    rows, out = np.load(io.BytesIO(data)), io.BytesIO()
    change = rng.choice(
        ("value", "value", "value", "pickle", "floats", "2-D", "none", "Fortran", "version", "shape", "deep")
    )
    if change == "value":
        column, number = rng.choice(rows.dtype.names), rng.choice(NUMBERS[:9])
        value = np.array(min(number, 2**63 - 1))
        # Features are of half precision.
        with np.errstate(all="ignore"):
            value = value.astype(rows.dtype[column].base)
        rows[column][rng.randrange(len(rows)) if rng.random() < 0.5 else slice(None)] = value
        change = f"{column} = {number}"
    if change in ("shape", "deep"):
        length = int.from_bytes(data[8:10], "little")
        header, rest = data[10 : 10 + length], data[10 + length :]
        number = rng.choice(NUMBERS[:9])
        old = b"(%d,)" % len(rows)
        header = (
            header.replace(old, b"(%d,)" % number)
            if change == "shape"
            else b"{'descr': " + b"(" * 5_000 + b"\n"
        )
        out.write(b"\x93NUMPY\x02\x00" + len(header).to_bytes(4, "little") + header + rest)
    elif change == "pickle":
        np.save(out, np.array([Pickled()], dtype=object), allow_pickle=True)
    elif change == "version":
        np.lib.format.write_array(out, rows, version=(3, 0))
    else:
        other = {"floats": np.zeros(5), "2-D": np.stack([rows] * 2), "none": rows[:0]}.get(change, rows)
        np.save(out, np.asfortranarray(np.stack([rows] * 2)) if change == "Fortran" else other)
    return out.getvalue(), change


def _safetensors(rng: Random, data: bytes) -> tuple[bytes, str]:
    length = int.from_bytes(data[:8], "little")
    if rng.random() < 0.1:
        return (2**62).to_bytes(8, "little") + data[8:], "header of 2^62 bytes"
    if rng.random() < 0.2:
        # Not a number, or as good as none, in a weight.
        place = rng.randrange(8 + length, len(data) - 4)
        return data[:place] + rng.choice((b"\xff", b"\x7f")) * 4 + data[place + 4 :], f"number at {place}"
    tree, change = mutate_tree(rng, json.loads(data[8 : 8 + length]))
    header = _dumps(tree)
    return len(header).to_bytes(8, "little") + header + data[8 + length :], change


def _pickle(rng: Random, _: bytes) -> tuple[bytes, str]:
    import torch

    out, change = io.BytesIO(), rng.choice(("pickle", "in torch", "no tensors", "list", "deep"))
    if change == "pickle":
        return pickle.dumps({"a": Pickled()}), change
    torch.save(
        {"in torch": {"a": Pickled()}, "no tensors": {"a": "b"}, "deep": {"a": {"b": 1}}}.get(change, [1]),
        out,
    )
    return out.getvalue(), change


def _tar(rng: Random, data: bytes) -> tuple[bytes, str]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar.getmembers()]  # type: ignore[union-attr]
    number = rng.randrange(len(members))
    member, content = members[number]
    change, value = (
        rng.choice(("name", "name", "type", "link", "size", "content", "content", "twice", "drop")),
        nasty(rng),
    )
    if change == "name":
        stem = str(value)[:5_000] if rng.random() < 0.7 else "../escaped"
        member.name = stem + rng.choice(("", Path(member.name).suffix))
    elif change == "type":
        member.type = rng.choice(
            (tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.CONTTYPE, b"Z", b"x", b"L", b"S")
        )
    elif change == "link":
        member.type, member.linkname = rng.choice((tarfile.SYMTYPE, tarfile.LNKTYPE)), rng.choice(PATHS)
    elif change == "content":
        content, value = (_json if member.name.endswith("json") else _image)(rng, content)
    elif change == "twice":
        members.append(members[number])
    elif change == "drop":
        del members[number]
    members = [(each, content if each is member else old) for each, old in members]
    out = io.BytesIO()
    for each, content in members:
        each.size = rng.choice(NUMBERS[:9]) if change == "size" and each is member else len(content)
        # PAX has no header for such a size.
        form = tarfile.PAX_FORMAT if abs(each.size) < 8**11 else tarfile.GNU_FORMAT
        out.write(each.tobuf(form, "utf-8", "surrogatepass"))
        out.write(content + bytes(-len(content) % 512))
    return out.getvalue() + bytes(1024), f"{change} of member {number} {value!r:.60}"


def _image(rng: Random, data: bytes) -> tuple[bytes, str]:
    """Change an image's sides in its header, or the number of its scans."""
    sides = [rng.choice((0, 1, 300, 20_000, 65_535)) for _ in range(2)]
    if data.startswith(b"\x89PNG"):
        packed = struct.pack(">2I", *(rng.choice((side, side << 15)) for side in sides))
        header = b"IHDR" + packed + data[24:29]
        return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:], f"sides {sides}"
    if data.startswith(b"\xff\xd8"):
        scan = data.rfind(b"\xff\xda")
        if rng.random() < 0.4 and data.find(b"\xff\xc2") > 0:
            times = rng.choice((10, 600, 20_000))
            return data[:-2] + data[scan:-2] * times + data[-2:], f"{times} scans"
        frame = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
        return data[: frame + 5] + struct.pack(">2H", *sides) + data[frame + 9 :], f"sides {sides}"
    if data.startswith(b"GIF"):
        return data[:6] + struct.pack("<2H", *sides) + data[10:], f"sides {sides}"
    if data.startswith(b"BM"):
        signed = struct.pack("<2i", *(rng.choice((1, -1)) * side for side in sides))
        return data[:18] + signed + data[26:], f"sides {sides}"
    return mutate_bytes(rng, data)


_FORMATS: dict[str, Callable[[Random, bytes], tuple[bytes, str]]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".toml": _toml,
    ".yaml": _yaml,
    **dict.fromkeys((".csv", ".tsv"), _table),
    ".npy": _npy,
    ".safetensors": _safetensors,
    ".pth": _pickle,
    ".tar": _tar,
    **dict.fromkeys((".jpg", ".png", ".gif", ".bmp", ".webp"), _image),
}
