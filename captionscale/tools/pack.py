"""The command `pack`: read a data set, write shards."""

import signal
from argparse import Namespace

from captionscale.data import packing
from captionscale.data.shard_writer import REJECTED
from captionscale.data.sources import expected_counts, source
from captionscale.data.sources.record import sort_records
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
        dataset = source.load(options.source)
        records = sort_records(dataset.read(options))
        files = dataset.files(options)
    if not records:
        raise UserError(f"pack {options.source}: no images; expected at least one; give a whole data set")
    if options.expect:
        place = str(files[0]) if files else f"pack {options.source}"
        expected_counts.check_counts(records, dict(options.expect), place)
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
            manifest = packing.pack(records, options.out, sources=files, options=how, progress=bar.advance)
    finally:
        signal.signal(signal.SIGTERM, previous)
    for split in {record.split: None for record in records}:
        facts = manifest.splits[split]
        rejected = f", {facts.rejected:,} rejected (see {REJECTED})" if facts.rejected else ""
        print(f"{options.out}: {split}: {facts.images:,} images, {facts.captions:,} captions{rejected}")


def _stop(*_: object) -> None:
    raise UserError("pack: stopped by SIGTERM; finished shards are kept, and the same command resumes")
