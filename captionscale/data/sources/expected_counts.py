"""Check the number of images in each split; known numbers explain a mismatch."""

from collections import Counter
from collections.abc import Iterable, Mapping

from captionscale.data.sources.record import Record
from captionscale.errors import UserError

# Training on 82,783 instead of 113,287 images is a common mistake.
# Source: the data sets' own files; Karpathy & Fei-Fei 2015 (arXiv:1412.2306).
_KNOWN = {
    82_783: "COCO 2014's official train, or Karpathy's train without the 30,504 restval images",
    40_504: "COCO 2014's official val",
    40_775: "COCO 2014's test",
    30_504: "Karpathy's restval of COCO alone, without the 82,783 images of train2014",
    113_287: "Karpathy's train of COCO with the 30,504 restval images",
    123_287: "COCO 2014's official train and val together",
    118_287: "COCO 2017's official train",
    5_000: "COCO 2017's official val, or Karpathy's val or test of COCO",
    40_670: "COCO 2017's test",
    6_000: "Flickr8k's train",
    29_000: "Karpathy's train of Flickr30k",
    1_014: "Karpathy's val of Flickr30k",
    1_000: "Flickr8k's val or test, or Karpathy's test of Flickr30k",
    31_783: "all of Flickr30k, without splits",
}


def check_counts(records: Iterable[Record], expected: Mapping[str, int], place: str) -> None:
    """Check that each split has the expected number of images; `place` is the data set, for the error."""
    found = Counter(record.split for record in records)
    faults = []
    for split in [*expected, *sorted(found.keys() - expected.keys())]:
        images = found[split]
        if split not in expected:
            faults.append(f"split {split!r} has {images:,} images, expected no such split")
        elif not images and expected[split]:
            faults.append(f"no split {split!r}, expected {expected[split]:,} images")
        elif images != expected[split]:
            known = f"; {images:,} is {_KNOWN[images]}" if images in _KNOWN else ""
            faults.append(f"split {split!r} has {images:,} images, expected {expected[split]:,}{known}")
    if faults:
        raise UserError(
            f"{place}: {'; '.join(faults)}; give the files of the data set that is meant, whole, or correct"
            " what is expected"
        )
