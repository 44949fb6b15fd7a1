"""The verb `pack`: any data set in, shards out."""

from argparse import Namespace
from pathlib import Path

from captionscale.data import packing
from captionscale.data.sources import coco, flickr, karpathy, own, tars, totals
from captionscale.data.sources.record import Record
from captionscale.errors import UserError
from captionscale.files import cores
from captionscale.progress import progress, say


def pack(options: Namespace) -> None:
    """Read a data set and write its shards.

    Args:
        options: As the command line gives them.

    Raises:
        UserError: As the readers and `packing.pack` do; other totals than expected.
    """
    records, sources = _read(options)
    if options.expect:
        totals.expect(records, dict(options.expect), str(sources[0]))
    if not any(record.captions for record in records):
        say("note: no captions, so these shards can be captioned, but neither trained nor scored on")
    how = packing.Options(
        images_per_shard=options.images_per_shard,
        short_side=options.resize,
        quality=options.quality,
        whole=not options.no_decode,
        max_rejected=options.max_rejected,
        workers=options.workers or cores(),
    )
    with progress("packing", len(records)) as bar:
        manifest = packing.pack(records, options.out, sources=sources, options=how, progress=bar.advance)
    for split in {record.split: None for record in records}:
        facts = manifest.splits[split]
        rejected = f", {facts.rejected:,} rejected (see {packing.REJECTED})" if facts.rejected else ""
        print(f"{options.out}: {split}: {facts.images:,} images, {facts.captions:,} captions{rejected}")


def _read(options: Namespace) -> tuple[list[Record], list[Path]]:
    """Return a data set's records, and the files that they were read from."""

    def first_id(splits: set[str]) -> int:
        return packing.first_id(options.out, splits)

    match options.kind:
        case "coco" if options.lists:
            records = coco.with_lists(options.images, options.captions, options.lists, options.restval)
            return records, [*options.captions, *sorted(options.lists.glob("karpathy_*_images.txt"))]
        case "coco":
            if options.split is None or len(options.captions) != 1:
                raise UserError(
                    "pack coco: wanted one --captions file and the --split that it is,"
                    " or both files of 2014 and --lists"
                )
            return coco.official(options.images, options.captions[0], options.split), options.captions
        case "karpathy":
            return karpathy.read(options.images, options.captions, options.restval), [options.captions]
        case "flickr8k" | "flickr30k":
            records = flickr.read(options.images, options.captions, options.splits)
            if options.splits is None:
                say(f"note: no --splits, so all {len(records):,} images are in the split 'train'")
            return records, [options.captions]
        case "table":
            return own.table(options.captions, options.images, options.split, first_id), [options.captions]
        case "folder":
            return own.folder(options.images, options.split, first_id), []
        case "webdataset":
            return tars.read(options.tars, options.split, first_id), tars.files(options.tars)
    raise AssertionError(options.kind)
