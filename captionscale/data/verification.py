"""Check shards against their manifest, index and hashes."""

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import numpy as np

from captionscale.data import decode
from captionscale.data.manifest import CURE, Manifest, index_name
from captionscale.data.packing import WORK, unnamed_files
from captionscale.data.shard_writer import REJECTED, read_rejected
from captionscale.data.shards import Split
from captionscale.data.sources.tars import iter_members
from captionscale.data.storage import LocalStorage, Storage, as_storage, read_manifest
from captionscale.errors import UserError
from captionscale.files import blake3_of


@dataclass
class VerificationReport:
    """Result of a verification: damage and images in two splits, and findings that need no repair."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def verify(
    where: Storage | Path,
    *,
    deep: bool = False,
    allow_leaks: bool = False,
    workers: int = 1,
    progress: Callable[[int], None] = lambda _: None,
) -> VerificationReport:
    """Compare files with their checksums, and the index with tars and samples.

    Args:
        where: Output of `captionscale pack`.
        deep: Also decode every image.
        allow_leaks: The same image in two splits is a note, not a problem.
        workers: Number of threads.
        progress: Called with the number of images of each checked shard.
    """
    place = as_storage(where)
    facts, findings = read_manifest(place), VerificationReport()
    findings.problems += _check_files(place, facts)
    splits = []
    for name in facts.splits:
        try:
            split = Split(place, name, check_sizes=False)
            _check_index(split)
        except UserError as error:
            findings.problems.append(str(error))
        else:
            splits.append(split)

    jobs = [(split, number) for split in splits for number in range(len(split.info.shards))]
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(lambda job: _check_shard(*job, deep=deep), jobs)
        for (split, number), problems in zip(jobs, found, strict=True):
            findings.problems += problems
            progress(split.info.shards[number].images)
    _find_duplicates(splits, findings, allow_leaks)
    return findings


def _check_files(place: Storage, facts: Manifest) -> Iterator[str]:
    """Yield files that the manifest does not name, and wrong numbers of rejected images."""
    # Not every server lists files, and unnamed ones are never read.
    if isinstance(place, LocalStorage):
        for path in unnamed_files(place.path, facts):
            cure = "finish that pack" if (place.path / WORK).exists() else f"remove {path.name}"
            yield f"{path}: the manifest does not name it; {cure}, or remove the folder and pack again"
    # Some servers answer a missing file with 403.
    if not any(split.rejected for split in facts.splits.values()):
        return
    found = Counter(image.split for image in read_rejected(place))
    for name, split in facts.splits.items():
        if found[name] != split.rejected:
            yield (
                f"{place}/{REJECTED}: {found[name]:,} images of split '{name}', manifest says"
                f" {split.rejected:,}; {CURE}"
            )


def _check_index(split: Split) -> None:
    found = [int(split.index["captions"].sum()), *split.shard_sizes.tolist()]
    if found != [split.info.captions, *(shard.images for shard in split.info.shards)]:
        raise UserError(
            f"{split.storage}/{index_name(split.name)}: number of captions or images differs from the"
            f" manifest's; {CURE}"
        )


def _check_shard(split: Split, number: int, *, deep: bool) -> list[str]:
    facts = split.info.shards[number]
    items = np.flatnonzero(split.index["shard"] == number).tolist()
    try:
        split.storage.check_size(facts)
        with split.storage.local_path(facts) as path:
            found = blake3_of(path)
            problems = [problem for item in items for problem in check_sample(split, item, deep=deep)]
            if not problems and found == facts.blake3:
                problems += _compare_with_tar(split, path, items)
    except UserError as error:
        return [str(error)]
    if not problems and found != facts.blake3:
        problems.append(
            f"{split.storage}/{facts.name}: blake3 {found}, manifest says {facts.blake3}, though"
            f" each image and caption is as packed: a tar header, or the manifest, is damaged; {CURE}"
        )
    return problems


def check_sample(split: Split, item: int, *, deep: bool) -> Iterator[str]:
    """Yield the problems of one sample, an item of a split; `deep` decodes its image."""
    row, place = split.index[item], split.place(item)
    try:
        data, sample = split.image(item), split.sample(item)
        if (sample.image_id, len(sample.captions)) != (row["image_id"], row["captions"]):
            yield (
                f"{place}: the sample says image {sample.image_id} with {len(sample.captions)} captions, the"
                f" index says image {row['image_id']} with {row['captions']}; {CURE}"
            )
        if deep:
            info = decode.image_info(data, place, full_decode=True)
            if (info.width, info.height) != (row["width"], row["height"]):
                yield f"{place}: {info.width} x {info.height} pixels, the index says otherwise; {CURE}"
    except UserError as error:
        yield str(error)


def _compare_with_tar(split: Split, path: Path, items: list[int]) -> Iterator[str]:
    """Yield where the tar's headers, which other readers use, and the index differ."""
    columns = ["image_offset", "image_size", "json_offset", "json_size"]
    rows = np.stack([split.index[items][column] for column in columns], axis=1)
    expected = [(offset, size) for offset, size in rows.reshape(-1, 2).tolist()]
    found = [(member.offset_data, member.size) for member in iter_members(path)]
    differs = [a != b for a, b in zip_longest(found, expected)]
    if any(differs):
        near = items[min(differs.index(True) // 2, len(items) - 1)]
        yield f"{split.place(near)}: the index differs from the tar; {CURE}"


def _find_duplicates(splits: list[Split], findings: VerificationReport, allow_leaks: bool) -> None:
    """Find images with the same bytes, across splits (a leak) or within one."""
    if not splits:
        return
    hashes = np.concatenate([split.index["image_hash"] for split in splits])
    places = [(split, item) for split in splits for item in range(len(split))]
    order = np.argsort(hashes, kind="stable")
    leaks: list[str] = []
    twins: list[str] = []
    for k in np.flatnonzero(hashes[order][1:] == hashes[order][:-1]).tolist():
        pair = places[order[k]], places[order[k + 1]]
        try:
            first, second = [split.image(item) for split, item in pair]
        except UserError:
            continue  # Reported above.
        if first == second:
            names = [f"image {split.index['image_id'][item]} of split '{split.name}'" for split, item in pair]
            (twins if pair[0][0] is pair[1][0] else leaks).append(f"{' and '.join(names)} are the same bytes")
    if leaks and not allow_leaks:
        leaks.append(
            f"{len(leaks):,} images are in two splits, so training may see scored images; expected each"
            " in one; take them out of the data set's lists and pack again, or accept them with --allow-leaks"
        )
    (findings.notes if allow_leaks else findings.problems).extend(leaks)
    findings.notes += twins
