import pytest

from captionscale.data.sources import expected_counts
from captionscale.data.sources.record import Record
from captionscale.errors import UserError


def of(**images):
    return [
        Record(n, split, ("a",), "i", f"{n}.jpg") for split, count in images.items() for n in range(count)
    ]


def test_records_of_the_expected_totals_pass():
    expected_counts.check_counts(of(train=3, val=2), {"train": 3, "val": 2}, "coco")
    expected_counts.check_counts(of(train=3), {"train": 3, "val": 0}, "coco")
    expected_counts.check_counts([], {}, "coco")


def test_the_most_common_mistake_is_named():
    records = [Record(1, "train", ("a",), "i", "1.jpg")] * 82_783
    with pytest.raises(
        UserError,
        match=r"^coco: split 'train' has 82,783 images, expected 113,287; 82,783 is COCO 2014's official"
        r" train, or Karpathy's train without the 30,504 restval images; give the files",
    ):
        expected_counts.check_counts(records, {"train": 113_287}, "coco")


def test_every_wrong_split_is_named_missing_and_surplus_ones_too():
    with pytest.raises(UserError) as refused:
        expected_counts.check_counts(of(train=3, vla=2, test=1), {"train": 4, "val": 2, "test": 1}, "place")
    assert str(refused.value) == (
        "place: split 'train' has 3 images, expected 4; no split 'val', expected 2 images; split 'vla'"
        " has 2 images, expected no such split; give the files of the data set that is meant, whole, or"
        " correct what is expected"
    )
