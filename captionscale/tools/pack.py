"""The command `pack`: read a data set, write shards."""

import signal
from argparse import Namespace
from pathlib import Path
from typing import Literal

from captionscale.data import packing
from captionscale.data.sources import coco, custom, expected_counts, flickr, karpathy, tars
from captionscale.data.sources.record import Record
from captionscale.errors import UserError
from captionscale.machine import cpu_count
from captionscale.progress import progress, say, spinner


def pack(options: Namespace) -> None:
    """Read a data set and write its shards.

    Args:
        options: Parsed by the command line.

    Raises:
        UserError: As by the readers and `packing.pack`; or totals other than expected.
    """
    with spinner("reading the data set"):
        records, sources = _read(options)
    if options.expect:
        expected_counts.check_counts(records, dict(options.expect), str(sources[0]))
    if not any(record.captions for record in records):
        say("note: no captions, so these shards can be captioned, but not used for training or scoring")
    if options.quality is not None and options.resize is None:
        raise UserError("pack: --quality applies to resized images, expected --resize with it; leave it out")
    how = packing.PackOptions(
        images_per_shard=options.images_per_shard,
        short_side=options.resize,
        quality=options.quality or 95,
        full_decode=not options.no_decode,
        max_rejected=options.max_rejected,
        workers=options.workers or cpu_count(),
    )
    # Schedulers end jobs with this signal: finished shards are kept for the next call.
    previous = signal.signal(signal.SIGTERM, _stop)
    try:
        with progress("packing", len(records)) as bar:
            manifest = packing.pack(records, options.out, sources=sources, options=how, progress=bar.advance)
    finally:
        signal.signal(signal.SIGTERM, previous)
    for split in {record.split: None for record in records}:
        facts = manifest.splits[split]
        rejected = f", {facts.rejected:,} rejected (see {packing.REJECTED})" if facts.rejected else ""
        print(f"{options.out}: {split}: {facts.images:,} images, {facts.captions:,} captions{rejected}")


def _stop(*_: object) -> None:
    raise UserError("pack: stopped by SIGTERM; finished shards are kept, and the same command resumes")


def _read(options: Namespace) -> tuple[list[Record], list[Path]]:
    """Return a data set's records, and the files they were read from."""

    def first_image_id(splits: set[str]) -> int:
        return packing.first_image_id(options.out, splits)

    restval: Literal["train", "drop"] = "drop" if getattr(options, "restval", None) == "drop" else "train"
    match options.kind:
        case "coco" if options.lists:
            if options.split is not None:
                raise UserError(
                    "pack coco: found --split with --lists, expected one of them; leave out --split"
                )
            records = coco.read_karpathy_lists(options.images, options.captions, options.lists, restval)
            return records, [*options.captions, *sorted(options.lists.glob("karpathy_*_images.txt"))]
        case "coco":
            if options.split is None or len(options.captions) != 1 or options.restval is not None:
                raise UserError(
                    "pack coco: expected one --captions file with its --split, or both files of 2014 with"
                    " --lists; --restval only with --lists"
                )
            return coco.read_official(options.images, options.captions[0], options.split), options.captions
        case "karpathy":
            return karpathy.read(options.images, options.captions, restval), [options.captions]
        case "flickr8k" | "flickr30k":
            records = flickr.read(options.images, options.captions, options.splits)
            if options.splits is None:
                say(f"note: no --splits, so all {len(records):,} images are in the split 'train'")
            lists = [] if options.splits is None else sorted(options.splits.glob("*.txt"))
            return records, [options.captions, *(path for path in lists if path.name in flickr.SPLIT_OF_LIST)]
        case "table":
            return custom.read_table(options.captions, options.images, options.split, first_image_id), [
                options.captions
            ]
        case "folder":
            return custom.read_folder(options.images, options.split, first_image_id), []
        case "webdataset":
            return tars.read(options.tars, options.split, first_image_id), tars.find_tars(options.tars)
    raise AssertionError(options.kind)
