"""Pack records into shards in parallel; a killed call resumes at its last finished shard."""

import hashlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version as version_of
from itertools import chain, combinations, groupby
from pathlib import Path
from shutil import rmtree

import msgspec
import numpy as np
from jaxtyping import Int

from captionscale import parsing, version
from captionscale.data import manifest, shards
from captionscale.data.index import index_name
from captionscale.data.manifest import MAX_REJECTED_BYTES, Images, Manifest, Shard, SplitInfo
from captionscale.data.pack_workers import write_shards
from captionscale.data.shard_writer import RejectedImage, ShardJob, WrittenShard, read_rejected
from captionscale.data.sources.record import Record, sort_records
from captionscale.errors import UserError
from captionscale.files import atomic_write, lock, read_file, sha256_of
from captionscale.machine import cpu_count
from captionscale.progress import spinner

REJECTED = "rejected.jsonl"
WORK = ".packing"
_PLAN = "plan"


class _Plan(msgspec.Struct, frozen=True):
    """An unfinished call: the tool and the fingerprint of each split."""

    tool: str
    splits: dict[str, str]


_PLAN_DECODER = msgspec.json.Decoder(_Plan)


@dataclass(frozen=True)
class PackOptions:
    """Options of packing. When a killed call resumes, only `max_rejected` and `workers` may change.

    Attributes:
        images_per_shard: Images in a full shard, including rejected ones.
        short_side: Resize larger images to this shorter side, in pixels; None keeps the original bytes.
        quality: JPEG quality of resized images.
        full_decode: Decode every image to find damage now.
        max_rejected: Maximum fraction of unreadable images.
        workers: Number of processes.
    """

    images_per_shard: int = 1000
    short_side: int | None = None
    quality: int = 95
    full_decode: bool = True
    max_rejected: float = 0.001
    workers: int = 1


def pack(
    records: Iterable[Record],
    out: Path,
    *,
    sources: Iterable[Path],
    options: PackOptions = PackOptions(),
    progress: Callable[[int], None] = lambda _: None,
) -> Manifest:
    """Write records as new splits into `out`.

    The same call resumes a killed one. The files are the same for any number of workers and interruptions.

    Args:
        records: Records of one or more splits.
        out: Folder of shards; created if missing.
        sources: Files that the records were read from; the manifest keeps their hashes.
        options: Options of packing.
        progress: Called with the number of images of each finished shard.

    Raises:
        UserError: Too many images are unreadable, a split or image is packed already, an unfinished call had
            other records or options, another process is packing into `out`, or the disk is full.
    """
    with lock(out, "captionscale pack"):
        before = manifest.read(out) if (out / manifest.MANIFEST).exists() else None
        hashes = _hashes(sources)
        by_split = {
            split: list(members) for split, members in groupby(sort_records(records), lambda it: it.split)
        }
        fingerprints = {split: _fingerprint(members, hashes, options) for split, members in by_split.items()}
        if before and all(
            split in before.splits and before.splits[split].fingerprint == fingerprint
            for split, fingerprint in fingerprints.items()
        ):
            rmtree(out / WORK, ignore_errors=True)
            progress(sum(map(len, by_split.values())))
            return before
        _refuse_known(out, before, by_split, options)
        work = _open_work(out, before, fingerprints, _tool(options))
        jobs = {split: _jobs(split, members, out, work, options) for split, members in by_split.items()}
        written: dict[Path, WrittenShard] = {}
        for job, shard in write_shards([*chain(*jobs.values())], options.workers):
            written[job.path] = shard
            progress(len(job.records))
        rejected = [image for split in jobs for job in jobs[split] for image in written[job.path].rejected]
        _write_rejected(out, rejected, fingerprints)
        _refuse_rejected(out, rejected, by_split, options)
        splits = dict(before.splits) if before else {}
        for split in jobs:
            finished = {job.path.name: written[job.path] for job in jobs[split]}
            splits[split] = _finish(split, finished, out, hashes, fingerprints[split], _tool(options))
        result = Manifest(manifest.FORMAT, _images(options), splits)
        with atomic_write(out / manifest.MANIFEST) as file:
            file.write(result.dumps())
        rmtree(work)
        return result


def first_image_id(out: Path, splits: Iterable[str]) -> int:
    """Return the first image id for splits whose images have no ids; the same when packing is repeated."""
    if not (out / manifest.MANIFEST).exists():
        return 1
    ids: dict[str, list[int]] = {
        split: shards.Split(out, split).index["image_id"].tolist() for split in manifest.read(out).splits
    }
    for image in _read_rejected(out):
        ids.setdefault(image.split, []).append(image.image_id)
    known = [image_id for split in splits for image_id in ids.get(split, [])]
    # A damaged manifest may have no splits.
    last = max((image_id for each in ids.values() for image_id in each), default=0)
    return min(known) if known else 1 + last


def _hashes(sources: Iterable[Path]) -> dict[str, str]:
    paths = list(sources)
    # Relative to their common folder.
    root = os.path.commonpath([path.absolute().parent for path in paths]) if paths else ""
    names = [os.path.relpath(path, root).encode(errors="replace").decode() for path in paths]
    with spinner("hashing what the data set is read from"), ThreadPoolExecutor(cpu_count()) as pool:
        return dict(zip(names, pool.map(sha256_of, paths), strict=True))


def _fingerprint(records: Iterable[Record], hashes: dict[str, str], options: PackOptions) -> str:
    """Hash all that a split's shards depend on, except the images' bytes and folders."""
    facts = (manifest.FORMAT, sorted(hashes.items()), options.images_per_shard, options.full_decode)
    hasher = hashlib.sha256(repr((*facts, _images(options))).encode())
    for it in records:
        # Tars count, folders do not: they may be mounted elsewhere.
        tar = "" if it.size is None else it.source.rpartition("/")[2]
        hasher.update(repr((it.image_id, it.captions, tar, it.name, it.offset, it.size)).encode())
    return hasher.hexdigest()


def _tool(options: PackOptions) -> str:
    makers = [] if options.short_side is None else ["pillow", "simplejpeg", "torch"]
    versions = [f"{name} {version_of(name)}" for name in makers]
    return ", ".join([f"captionscale {version.__version__}", *versions])


def _images(options: PackOptions) -> Images:
    return Images() if options.short_side is None else Images(options.short_side, options.quality)


def _refuse_known(
    out: Path, before: Manifest | None, by_split: dict[str, list[Record]], options: PackOptions
) -> None:
    """Refuse repeated splits or images, and images stored in two ways."""
    ids: dict[str, Int[np.ndarray, "image"]] = {}
    for split, members in by_split.items():
        if not manifest.SPLIT_NAME.fullmatch(split):
            raise UserError(
                f"split {split!r}: expected letters, digits, - and _, as it names files; rename it"
            )
        if not 0 <= members[0].image_id <= members[-1].image_id < 1 << 63:
            raise UserError(
                f"split '{split}': an image id is below 0 or above 2^63 - 1; expected them within; renumber"
            )
        for record in members:
            if not (record.name.isascii() or _is_utf8(record.name)):
                raise UserError(
                    f"{record.name!r}: expected a file name in UTF-8, which shards can hold; rename it"
                )
        found = ids[split] = np.array([record.image_id for record in members])
        repeated = found[1:][found[1:] == found[:-1]]
        if len(repeated):
            raise UserError(
                f"split '{split}': image {repeated[0]} is there twice; expected each id once; renumber"
            )
    if before is not None:
        if before.images != _images(options):
            raise UserError(
                f"{out}: images are stored as {before.images}, this call has {_images(options)};"
                " expected the same for all splits; give the same options, or take another --out"
            )
        for split in before.splits:
            if split in ids:
                raise UserError(
                    f"{out}: split '{split}' is packed already, from other files or with other options;"
                    " take another --out, or remove this folder"
                )
            ids[split] = shards.Split(out, split).index["image_id"]
    for split, other in combinations(ids, 2):
        both = np.intersect1d(ids[split], ids[other])
        if len(both):
            raise UserError(
                f"{out}: {len(both):,} images of split '{split}', such as image {both[0]}, are in split"
                f" '{other}' too; expected each image in one split only; take another --out or other images"
            )


def _is_utf8(name: str) -> bool:
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False


def _open_work(out: Path, before: Manifest | None, fingerprints: dict[str, str], tool: str) -> Path:
    """Return the folder of finished work of this call; create it if there is none."""
    work = out / WORK
    plan, expected = work / _PLAN, _Plan(tool, fingerprints)
    known = before.splits if before else {}
    if plan.exists():
        try:
            found = parsing.decode(read_file(plan), _PLAN_DECODER)
        except (OSError, ValueError):
            raise UserError(
                f"{plan}: damaged; expected what an unfinished pack left; remove {work}"
            ) from None
        if found == expected:
            return work
        ended = {split: facts.fingerprint for split, facts in known.items()}
        if not found.splits.items() <= ended.items():
            other = "from other files or with other options" if found.tool == tool else f"by {found.tool}"
            raise UserError(
                f"{out}: a call that packed {', '.join(found.splits)} {other} was stopped here;"
                f" expected its end; run that command again, take another --out, or remove {out}"
            )
    rmtree(work, ignore_errors=True)
    named = {shard.name for facts in known.values() for shard in facts.shards}
    named |= {index_name(split) for split in known}
    for path in sorted([*out.glob("*.tar"), *out.glob("*.index.npy")]):
        if path.name not in named:
            raise UserError(
                f"{path}: no manifest names it; expected a folder of nothing but finished shards;"
                " move it away, or take another --out"
            )
    work.mkdir()
    with atomic_write(plan) as file:
        file.write(msgspec.json.encode(expected))
    return work


def _jobs(split: str, records: list[Record], out: Path, work: Path, options: PackOptions) -> list[ShardJob]:
    jobs = []
    for number, start in enumerate(range(0, len(records), options.images_per_shard)):
        path = out / manifest.shard_name(split, number)
        part = records[start : start + options.images_per_shard]
        done = work / f"{path.stem}.npz"
        jobs.append(
            ShardJob(path, number, part, options.full_decode, options.short_side, options.quality, done)
        )
    return jobs


def _write_rejected(out: Path, rejected: list[RejectedImage], splits: Iterable[str]) -> None:
    """Replace the lines of these splits; remove an empty file."""
    path = out / REJECTED
    lines = [line for line in _read_rejected(out) if line.split not in splits] + rejected
    if lines:
        with atomic_write(path) as file:
            file.write(msgspec.json.Encoder().encode_lines(lines))
    else:
        path.unlink(missing_ok=True)


def _read_rejected(out: Path) -> list[RejectedImage]:
    path = out / REJECTED
    return read_rejected(read_file(path, MAX_REJECTED_BYTES), str(path)) if path.exists() else []


def _refuse_rejected(
    out: Path, rejected: list[RejectedImage], by_split: dict[str, list[Record]], options: PackOptions
) -> None:
    most = options.max_rejected
    for split, members in by_split.items():
        bad = [image for image in rejected if image.split == split]
        if len(bad) > most * len(members) or len(bad) == len(members):
            expected = f"at most {most:.2%}" if len(bad) < len(members) else "at least one that can"
            raise UserError(
                f"{bad[0].file}: {bad[0].reason}; {len(bad):,} of the {len(members):,} images of split"
                f" '{split}' cannot be read, expected {expected}; {out / REJECTED} names them all;"
                " mend them and run the same command again, or raise --max-rejected"
            )


def _finish(
    split: str,
    written: dict[str, WrittenShard],
    out: Path,
    hashes: dict[str, str],
    fingerprint: str,
    tool: str,
) -> SplitInfo:
    """Write a split's index; return its manifest entry."""
    index = np.concatenate([shard.rows for shard in written.values()])
    index_path = out / index_name(split)
    with atomic_write(index_path) as file:
        np.save(file, index, allow_pickle=False)
    return SplitInfo(
        images=len(index),
        captions=int(index["captions"].sum()),
        rejected=sum(len(shard.rejected) for shard in written.values()),
        tool=tool,
        sources=hashes,
        fingerprint=fingerprint,
        index_sha256=sha256_of(index_path),
        shards=tuple(
            Shard(name, shard.size_bytes, shard.blake3, len(shard.rows)) for name, shard in written.items()
        ),
    )
