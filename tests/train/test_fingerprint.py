"""What a resume may and may not change."""

import pytest

from captionscale.config import Config
from captionscale.train.fingerprint import make_fingerprint, resume_conflicts


def config(**changes: object) -> Config:
    """Return an experiment with changed settings, given as `section__key=value`."""
    tree: dict[str, dict[str, object]] = {"data": {"shards": "shards"}}
    for name, value in changes.items():
        *sections, key = name.split("__")
        section: dict = tree
        for each in sections:
            section = section.setdefault(each, {})
        section[key] = value
    return Config.model_validate(tree)


SAVED = make_fingerprint(config(), shards="a" * 64, vocabulary="b" * 64)


def conflicts(hashes: dict[str, str] | None = None, **changes: object) -> list[str]:
    hashes = {"shards": "a" * 64, "vocabulary": "b" * 64} if hashes is None else hashes
    return resume_conflicts(SAVED, make_fingerprint(config(**changes), **hashes))


@pytest.mark.parametrize(
    ("key", "value", "conflict"),
    [
        ("seed", 1, "seed was 0, now 1"),
        ("data__min_count", 30, "data.min_count was 5, now 30"),
        ("data__image_size", 32, "data.image_size was 224, now 32"),
        ("model__decoder__hidden_size", 8, "model.decoder.hidden_size was 512, now 8"),
        ("train__micro_batch", 2, "train.micro_batch was 32, now 2"),
        ("train__score_metric", "BLEU-4", "train.score_metric was 'CIDEr-D', now 'BLEU-4'"),
    ],
)
def test_what_changes_the_result_of_a_run_prevents_a_resume(key: str, value: object, conflict: str) -> None:
    assert conflicts(**{key: value}) == [conflict]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data__shards", "moved"),
        ("data__workers", 1),
        ("model__encoder__weights", "moved.pth"),
        ("train__lr", 1e-5),
        ("train__epochs", 99),
        ("search__beam", 1),
    ],
)
def test_paths_workers_and_learning_rates_may_change(key: str, value: object) -> None:
    assert conflicts(**{key: value}) == []


def test_unknown_hashes_are_not_compared() -> None:
    changed = conflicts({"shards": "c" * 64, "vocabulary": "b" * 64})
    assert changed == ["shards was 'aaaaaaaaaaa...', now 'ccccccccccc...'"]
    assert conflicts({"shards": "a" * 64}) == []
