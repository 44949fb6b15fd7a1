"""What every source fulfills."""

from pathlib import Path

from captionscale.cli import main
from captionscale.commands.parser import parser
from captionscale.data.manifest import SPLIT_NAME
from captionscale.data.shards import Split
from captionscale.data.sources import source
from captionscale.data.sources.record import sort_records
from captionscale.data.verification import verify


def check(name: str, arguments: list[str], out: Path) -> None:
    """Assert that a source reads the same valid records each time, and that they pack as they are.

    Args:
        name: In the registry, or `module:Class`.
        arguments: Of `captionscale pack`, without --out; the data set has readable images only.
        out: A new folder for shards.
    """
    command = ["pack", name, *arguments, "--out", str(out), "--workers", "1"]
    options = parser().parse_args(command)
    dataset = source.load(name)
    records = sort_records(dataset.read(options))
    assert records
    assert sort_records(dataset.read(options)) == records
    assert len({record.image_id for record in records}) == len(records)
    for record in records:
        assert 0 <= record.image_id < 2**63
        assert SPLIT_NAME.fullmatch(record.split)
        assert isinstance(record.captions, tuple)
        assert all(caption == caption.strip() != "" for caption in record.captions)
    assert all(path.is_file() for path in dataset.files(options))

    main(command)
    assert verify(out, deep=True).problems == []
    splits = {split: Split(out, split) for split in {record.split for record in records}}
    packed = [
        (split.name, split.sample(item).image_id, split.captions(item), split.image(item))
        for split in splits.values()
        for item in range(len(split))
    ]
    expected = [(record.split, record.image_id, record.captions, record.read()) for record in records]
    assert sorted(packed) == sorted(expected)
