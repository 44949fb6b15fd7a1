"""The command `pack`: any data set in, shards out."""

import signal
from argparse import Namespace
from pathlib import Path
from typing import Literal

from captionscale.data import packing
from captionscale.data.sources import coco, custom, expected_counts, flickr, karpathy, tars
from captionscale.data.sources.record import Record
from captionscale.errors import UserError
from captionscale.files import cpu_count
from captionscale.progress import progress, say, spinner


def pack(options: Namespace) -> None:
    """Read a data set and write its shards.

    Args:
        options: As the command line gives them.

    Raises:
        UserError: As the readers and `packing.pack` do; other totals than expected.
    """
    with spinner("reading the data set"):
        records, sources = _read(options)
    if options.expect:
        expected_counts.check_counts(records, dict(options.expect), str(sources[0]))
    if not any(record.captions for record in records):
        say("note: no captions, so these shards can be captioned, but neither trained nor scored on")
    if options.quality is not None and options.resize is None:
        raise UserError("pack: --quality is that of shrunk images, wanted --resize with it; leave it out")
    how = packing.PackOptions(
        images_per_shard=options.images_per_shard,
        short_side=options.resize,
        quality=options.quality or 95,
        full_decode=not options.no_decode,
        max_rejected=options.max_rejected,
        workers=options.workers or cpu_count(),
    )
    # A scheduler ends jobs by this signal: what is in hand is finished, and the next call goes on.
    ours = signal.signal(signal.SIGTERM, _stop)
    try:
        with progress("packing", len(records)) as bar:
            manifest = packing.pack(records, options.out, sources=sources, options=how, progress=bar.advance)
    finally:
        signal.signal(signal.SIGTERM, ours)
    for split in {record.split: None for record in records}:
        facts = manifest.splits[split]
        rejected = f", {facts.rejected:,} rejected (see {packing.REJECTED})" if facts.rejected else ""
        print(f"{options.out}: {split}: {facts.images:,} images, {facts.captions:,} captions{rejected}")


def _stop(*_: object) -> None:
    raise UserError("pack: stopped by SIGTERM; finished shards are kept, and the same command goes on")


def _read(options: Namespace) -> tuple[list[Record], list[Path]]:
    """Return a data set's records, and the files that they were read from."""

    def first_image_id(splits: set[str]) -> int:
        return packing.first_image_id(options.out, splits)

    restval: Literal["train", "drop"] = "drop" if getattr(options, "restval", None) == "drop" else "train"
    match options.kind:
        case "coco" if options.lists:
            if options.split is not None:
                raise UserError("pack coco: --lists say the split of each image; leave out --split")
            records = coco.read_karpathy_lists(options.images, options.captions, options.lists, restval)
            return records, [*options.captions, *sorted(options.lists.glob("karpathy_*_images.txt"))]
        case "coco":
            if options.split is None or len(options.captions) != 1 or options.restval is not None:
                raise UserError(
                    "pack coco: wanted one --captions file and the --split that it is,"
                    " or both files of 2014 and --lists, with or without --restval"
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
