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

from captionscale import parsing, version
from captionscale.data import manifest, shards
from captionscale.data.index import INDEX_DTYPE
from captionscale.data.manifest import Images, Manifest, SplitInfo, index_name
from captionscale.data.pack_workers import write_shards
from captionscale.data.shard_writer import REJECTED, ShardJob, WrittenShard, read_rejected
from captionscale.data.sources.record import Record, sort_records
from captionscale.errors import UserError
from captionscale.files import atomic_write, lock, read_file, sha256_of
from captionscale.machine import cpu_count
from captionscale.progress import spinner

WORK = ".packing"


class _Plan(msgspec.Struct, frozen=True):
    """An unfinished call: the tool and the fingerprint of each split."""

    tool: str
    splits: dict[str, str]


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

    @property
    def images(self) -> Images:
        """How images are stored, for the manifest."""
        return Images() if self.short_side is None else Images(self.short_side, self.quality)


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
        before = Manifest(manifest.FORMAT, options.images, {})
        if (out / manifest.MANIFEST).exists():
            before = manifest.read(out)
        hashes = _hash_sources(sources)
        groups = groupby(sort_records(records), lambda record: record.split)
        by_split = {split: list(group) for split, group in groups}
        fingerprints = {split: _fingerprint(group, hashes, options) for split, group in by_split.items()}
        plan = _Plan(_tool(options), fingerprints)
        if before.splits and plan.splits.items() <= _fingerprints(before).items():
            rmtree(out / WORK, ignore_errors=True)
            progress(sum(map(len, by_split.values())))
            return before
        _check_records(by_split)
        _check_splits(out, before, by_split, options.images)
        work = _open_work(out, before, plan)
        jobs = {split: _jobs(split, group, out, work, options) for split, group in by_split.items()}
        written: dict[Path, WrittenShard] = {}
        for job, shard in write_shards([*chain(*jobs.values())], options.workers):
            written[job.path] = shard
            progress(len(job.records))
        splits = {split: [written[job.path] for job in jobs[split]] for split in jobs}
        _save_rejected(out, splits, options.max_rejected)
        infos = {split: _write_index(out, split, splits[split], plan, hashes) for split in splits}
        result = Manifest(manifest.FORMAT, options.images, before.splits | infos)
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
    for image in read_rejected(out):
        ids.setdefault(image.split, []).append(image.image_id)
    known = [image_id for split in splits for image_id in ids.get(split, [])]
    # A damaged manifest may have no splits.
    return min(known) if known else 1 + max(chain(*ids.values()), default=0)


def unnamed_files(folder: Path, facts: Manifest) -> list[Path]:
    """Return the tars and indexes in a folder that its manifest does not name."""
    named = {shard.name for split in facts.splits.values() for shard in split.shards}
    named |= {index_name(split) for split in facts.splits}
    files = sorted([*folder.glob("*.tar"), *folder.glob("*.index.npy")])
    return [path for path in files if path.name not in named]


def _hash_sources(sources: Iterable[Path]) -> dict[str, str]:
    paths = list(sources)
    # Relative to their common folder.
    root = os.path.commonpath([path.absolute().parent for path in paths]) if paths else ""
    names = [os.path.relpath(path, root).encode(errors="replace").decode() for path in paths]
    with spinner("hashing what the data set is read from"), ThreadPoolExecutor(cpu_count()) as pool:
        return dict(zip(names, pool.map(sha256_of, paths), strict=True))


def _fingerprint(records: Iterable[Record], hashes: dict[str, str], options: PackOptions) -> str:
    """Hash all that a split's shards depend on, except the images' bytes and folders."""
    facts = (manifest.FORMAT, sorted(hashes.items()), options.images_per_shard, options.full_decode)
    hasher = hashlib.sha256(repr((*facts, options.images)).encode())
    for it in records:
        # Tars count, folders do not: they may be mounted elsewhere.
        tar = "" if it.size is None else it.source.rpartition("/")[2]
        hasher.update(repr((it.image_id, it.captions, tar, it.name, it.offset, it.size)).encode())
    return hasher.hexdigest()


def _fingerprints(facts: Manifest) -> dict[str, str]:
    return {split: info.fingerprint for split, info in facts.splits.items()}


def _tool(options: PackOptions) -> str:
    libraries = [] if options.short_side is None else ["pillow", "simplejpeg", "torch"]
    versions = [f"{name} {version_of(name)}" for name in libraries]
    return ", ".join([f"captionscale {version.__version__}", *versions])


def _check_records(by_split: dict[str, list[Record]]) -> None:
    """Refuse what cannot name files or be in an index."""
    for split, records in by_split.items():
        if not manifest.SPLIT_NAME.fullmatch(split):
            raise UserError(
                f"split {split!r}: expected letters, digits, - and _, as it names files; rename it"
            )
        if not 0 <= records[0].image_id <= records[-1].image_id < 1 << 63:
            raise UserError(
                f"split '{split}': an image id is below 0 or above 2^63 - 1; expected them within; renumber"
            )
        previous = None
        for record in records:
            if not record.name.isascii() and record.name.encode(errors="replace").decode() != record.name:
                raise UserError(f"{record.place!r}: the name is not UTF-8; expected one that is; rename it")
            if record.image_id == previous:
                raise UserError(
                    f"split '{split}': image {previous} is there twice; expected each id once; renumber"
                )
            previous = record.image_id


def _check_splits(out: Path, before: Manifest, by_split: dict[str, list[Record]], images: Images) -> None:
    """Refuse images stored in two ways, and repeated splits or images."""
    if before.images != images:
        raise UserError(
            f"{out}: images are stored as {before.images}, this call has {images};"
            " expected the same for all splits; give the same options, or take another --out"
        )
    if both := before.splits.keys() & by_split.keys():
        raise UserError(
            f"{out}: split '{min(both)}' is packed already, from other files or with other options;"
            " take another --out, or remove this folder"
        )
    ids = {split: np.array([record.image_id for record in group]) for split, group in by_split.items()}
    ids |= {split: shards.Split(out, split).index["image_id"] for split in before.splits}
    for split, other in combinations(ids, 2):
        shared = np.intersect1d(ids[split], ids[other])
        if len(shared):
            raise UserError(
                f"{out}: {len(shared):,} images of split '{split}', such as image {shared[0]}, are in split"
                f" '{other}' too; expected each image in one split only; take another --out or other images"
            )


def _open_work(out: Path, before: Manifest, plan: _Plan) -> Path:
    """Return the folder of finished work of this call; create it if there is none."""
    work = out / WORK
    path = work / "plan"
    if path.exists():
        try:
            found = parsing.decode(read_file(path), msgspec.json.Decoder(_Plan))
        except (OSError, ValueError):
            raise UserError(
                f"{path}: damaged; expected what an unfinished pack left; remove {work}"
            ) from None
        if found == plan:
            return work
        if not found.splits.items() <= _fingerprints(before).items():
            other = (
                "from other files or with other options" if found.tool == plan.tool else f"by {found.tool}"
            )
            raise UserError(
                f"{out}: a call that packed {', '.join(found.splits)} {other} was stopped here;"
                f" expected its end; run that command again, take another --out, or remove {out}"
            )
    rmtree(work, ignore_errors=True)
    if unnamed := unnamed_files(out, before):
        raise UserError(
            f"{unnamed[0]}: no manifest names it; expected a folder of nothing but finished shards;"
            " move it away, or take another --out"
        )
    work.mkdir()
    with atomic_write(path) as file:
        file.write(msgspec.json.encode(plan))
    return work


def _jobs(split: str, records: list[Record], out: Path, work: Path, options: PackOptions) -> list[ShardJob]:
    size, jobs = options.images_per_shard, []
    for number, start in enumerate(range(0, len(records), size)):
        path = out / manifest.shard_name(split, number)
        part, done = records[start : start + size], work / f"{path.stem}.json"
        jobs.append(ShardJob(path, number, part, options.full_decode, options.images, done))
    return jobs


def _save_rejected(out: Path, splits: dict[str, list[WrittenShard]], most: float) -> None:
    """Replace the lines of these splits in `rejected.jsonl`; refuse too many."""
    rejected = {split: [image for shard in splits[split] for image in shard.rejected] for split in splits}
    path = out / REJECTED
    lines = [image for image in read_rejected(out) if image.split not in rejected]
    lines += chain(*rejected.values())
    if lines:
        with atomic_write(path) as file:
            file.write(msgspec.json.Encoder().encode_lines(lines))
    else:
        path.unlink(missing_ok=True)
    for split, bad in rejected.items():
        total = len(bad) + sum(shard.info.images for shard in splits[split])
        if len(bad) > most * total or len(bad) == total:
            expected = f"at most {most:.2%}" if len(bad) < total else "at least one that can"
            raise UserError(
                f"{bad[0].file}: {bad[0].reason}; {len(bad):,} of the {total:,} images of split"
                f" '{split}' cannot be read, expected {expected}; {path} names them all;"
                " repair them and run the same command again, or raise --max-rejected"
            )


def _write_index(
    out: Path, split: str, written: list[WrittenShard], plan: _Plan, hashes: dict[str, str]
) -> SplitInfo:
    """Write a split's index; return its manifest entry."""
    index = np.frombuffer(b"".join(shard.rows for shard in written), INDEX_DTYPE)
    path = out / index_name(split)
    with atomic_write(path) as file:
        np.save(file, index, allow_pickle=False)
    return SplitInfo(
        images=len(index),
        captions=int(index["captions"].sum()),
        rejected=sum(len(shard.rejected) for shard in written),
        tool=plan.tool,
        sources=hashes,
        fingerprint=plan.splits[split],
        index_sha256=sha256_of(path),
        shards=tuple(shard.info for shard in written),
    )
