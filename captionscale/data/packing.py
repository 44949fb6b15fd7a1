"""Write records as shards, whole or not at all."""

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import numpy as np
import webdataset

from captionscale import version
from captionscale.data import images, shards
from captionscale.data.sources import Record
from captionscale.errors import UserError
from captionscale.files import atomic, lock, sha256_of

IMAGES_PER_SHARD = 1000
_OWNER = {"user": "captionscale", "group": "captionscale"}


def pack(
    records: Sequence[Record],
    out: Path,
    *,
    sources: Iterable[Path],
    images_per_shard: int = IMAGES_PER_SHARD,
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Write records into `out`, beside the splits that are there already.

    Every image is decoded once, so that a damaged one is found now and not at step 30,000.

    Args:
        records: Of one or more splits.
        out: Folder of shards, made if need be.
        sources: Files that the records were read from; the manifest keeps their hashes.
        images_per_shard: Images in a full shard.
        progress: Called after each image.

    Raises:
        UserError: An unreadable image, a split or an image that is packed already, or another packer at
            work. What this call wrote is removed again.
    """
    by_split: dict[str, list[Record]] = {}
    for record in records:
        by_split.setdefault(record.split, []).append(record)
    written: list[Path] = []
    with lock(out, "captionscale pack"):
        try:
            manifest = _manifest_of(out)
            _refuse_known(out, manifest, by_split)
            hashes = {path.name: sha256_of(path) for path in sources}
            for split, members in by_split.items():
                manifest["splits"][split] = {
                    "images": len(members),
                    "captions": sum(len(record.captions) for record in members),
                    "sources": hashes,
                    **_write_split(split, members, out, images_per_shard, written, progress),
                }
            with atomic(out / shards.MANIFEST) as file:
                file.write(json.dumps(manifest, indent=1).encode())
        except BaseException:
            for path in written:
                path.unlink(missing_ok=True)
            raise


def _manifest_of(out: Path) -> dict[str, Any]:
    if (out / shards.MANIFEST).exists():
        return shards.read_manifest(out)
    tool = f"captionscale {version.__version__}"
    return {"format": shards.FORMAT, "tool": tool, "images": "original", "splits": {}}


def _refuse_known(out: Path, manifest: dict[str, Any], by_split: dict[str, list[Record]]) -> None:
    for split in by_split:
        if split in manifest["splits"]:
            raise UserError(
                f"{out}: split '{split}' is packed already; take another --out, or remove this folder"
            )
    ids = {split: [record.image_id for record in members] for split, members in by_split.items()}
    ids |= {split: shards.Split(out, split).index["image_id"].tolist() for split in manifest["splits"]}
    for split, other in combinations(ids, 2):
        both = np.intersect1d(ids[split], ids[other])
        if len(both):
            raise UserError(
                f"{out}: {len(both):,} images of split '{split}', such as image {both[0]}, are in split"
                f" '{other}' too; wanted each image in one split only; take another --out or other images"
            )


def _write_split(
    split: str,
    records: list[Record],
    out: Path,
    images_per_shard: int,
    written: list[Path],
    progress: Callable[[], None],
) -> dict[str, Any]:
    """Write a split's tars and index; return what the manifest says of them."""
    samples = _read_ahead(records)
    rows, facts = [], []
    for number in range(-(-len(records) // images_per_shard)):
        path = out / f"{split}-{number:05d}.tar"
        written.append(path)
        # A fixed time and owner: the same records give the same bytes.
        with atomic(path) as file, webdataset.TarWriter(file, encoder=False, mtime=0, **_OWNER) as tar:
            for sample in islice(samples, images_per_shard):
                tar.write(sample)
                progress()
        index = shards.index_shard(path, number)
        rows.append(index)
        facts.append(
            {
                "name": path.name,
                "size_bytes": path.stat().st_size,
                "sha256": sha256_of(path),
                "images": len(index),
            }
        )
    index_path = out / shards.index_name(split)
    written.append(index_path)
    with atomic(index_path) as file:
        np.save(file, np.concatenate(rows), allow_pickle=False)
    return {"index_sha256": sha256_of(index_path), "shards": facts}


def _read_ahead(records: list[Record]) -> Iterator[dict[str, Any]]:
    """Yield the samples of records in their order; threads read and decode the next ones meanwhile."""
    workers = os.cpu_count() or 1
    waiting: deque[Future[dict[str, Any]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for record in records:
                waiting.append(pool.submit(_sample, record))
                if len(waiting) > 4 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _sample(record: Record) -> dict[str, Any]:
    try:
        data = record.file.read_bytes()
    except OSError as error:
        raise UserError(
            f"{record.file}: cannot be read ({error.strerror}), wanted an image of the data set; put it back"
        ) from None
    images.decode(data, str(record.file))
    facts = {"image_id": record.image_id, "file": record.file.name, "captions": record.captions}
    return {
        "__key__": f"{record.image_id:012d}",
        images.extension(data): data,
        "json": json.dumps(facts, ensure_ascii=False).encode(),
    }
