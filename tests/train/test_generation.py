from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from experiment import tiny_config

from captionscale.config import Search
from captionscale.data.loader import Loader
from captionscale.data.shards import Split
from captionscale.distributed.ranks import Ranks
from captionscale.errors import UserError
from captionscale.model.captioner import Captioner
from captionscale.score.diagnostics import DANGLING
from captionscale.train.generation import caption_split, make_constraints
from captionscale.vocab import build, split_words


class OneOf(Ranks):
    """One of several ranks, without the others; tests replace `gather`."""

    def __init__(self, rank: int, size: int):
        super().__init__()
        self.rank, self.world_size = rank, size


@pytest.fixture
def captioner_and_loader(packed: Path, tmp_path: Path) -> tuple[Captioner, Loader]:
    config = tiny_config(tmp_path, packed)
    split = Split(packed, "val")
    vocabulary = build((caption for each in split.references().values() for caption in each), 1, None)
    return Captioner(config.model, len(vocabulary)), Loader(split, vocabulary, config.data)


@pytest.mark.parametrize("size", [1, 3, 8, 11])
def test_ranks_caption_every_image_once_with_the_captions_of_one_rank(
    captioner_and_loader: tuple[Captioner, Loader], monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    captioner, loader = captioner_and_loader
    alone = caption_split(captioner, loader, Search(beam=2, batch_size=3), Ranks(), "alone")
    results: list[list[dict[str, object]]] = []
    monkeypatch.setattr(OneOf, "gather", lambda _, items: results.append(items) or items)
    # One share alone is not the whole split, and is refused as such.
    refused = nullcontext() if size == 1 else pytest.raises(AssertionError, match="twice or not at all")
    for rank in range(size):
        with refused:
            caption_split(captioner, loader, Search(beam=2, batch_size=3), OneOf(rank, size), "part")
    together = [result for part in results for result in part]
    assert sorted(together, key=lambda result: result["image_id"]) == alone
    assert max(map(len, results)) - min(map(len, results)) <= 3


def test_generation_restores_the_mode_of_the_captioner(
    captioner_and_loader: tuple[Captioner, Loader],
) -> None:
    captioner, loader = captioner_and_loader
    for training in (True, False):
        captioner.train(training)
        caption_split(captioner, loader, Search(beam=1), Ranks(), "mode")
        assert captioner.training == training


def test_the_batch_size_does_not_change_captions_of_a_beam(
    captioner_and_loader: tuple[Captioner, Loader],
) -> None:
    captioner, loader = captioner_and_loader
    captions = [
        caption_split(captioner, loader, Search(beam=3, batch_size=batch), Ranks(), "batch")
        for batch in (1, 8)
    ]
    assert captions[0] == captions[1]
    assert len({result["image_id"] for result in captions[0]}) == len(
        np.unique(loader.split.index["image_id"])
    )


def test_a_sampled_caption_depends_on_the_seed_and_the_image_not_on_batch_or_ranks(
    captioner_and_loader: tuple[Captioner, Loader], monkeypatch: pytest.MonkeyPatch
) -> None:
    captioner, loader = captioner_and_loader
    sampled = [
        caption_split(captioner, loader, Search(method="sample", batch_size=batch), Ranks(), "batch")
        for batch in (1, 3, 8)
    ]
    assert sampled[0] == sampled[1] == sampled[2]
    results: list[dict[str, object]] = []
    monkeypatch.setattr(OneOf, "gather", lambda _, items: results.extend(items) or items)
    for rank in range(2):
        with pytest.raises(AssertionError):
            caption_split(captioner, loader, Search(method="sample", batch_size=3), OneOf(rank, 2), "part")
    assert sorted(results, key=lambda result: result["image_id"]) == sampled[0]
    loader.seed = 1
    other = caption_split(captioner, loader, Search(method="sample"), Ranks(), "seed")
    assert other != sampled[0]
    assert len({result["caption"] for result in other}) > 1


@pytest.mark.parametrize(
    "settings",
    [Search(beam=2), Search(beam=4, groups=2), Search(method="sample", top_k=50)],
    ids=["beam", "diverse", "sampled"],
)
def test_captions_of_a_split_follow_the_constraints_and_the_prefix(
    captioner_and_loader: tuple[Captioner, Loader], settings: Search
) -> None:
    captioner, loader = captioner_and_loader
    first = loader.vocabulary.words[-1]
    settings = settings.model_copy(update={"no_repeat_ngram_size": 1, "allow_dangling": False})
    for result in caption_split(
        captioner, loader, settings, Ranks(), "constraints", prefix=f" {first.upper()}. "
    ):
        words = split_words(result["caption"])
        assert words[0] == first
        assert len(set(words)) == len(words)
        assert words[-1] not in DANGLING
        assert "<unknown>" not in result["caption"]


def test_required_words_are_in_every_caption(captioner_and_loader: tuple[Captioner, Loader]) -> None:
    captioner, loader = captioner_and_loader
    required = loader.vocabulary.words[-3:]
    for result in caption_split(captioner, loader, Search(beam=2), Ranks(), "words", require=required):
        assert set(required) <= set(result["caption"].split())


@pytest.mark.parametrize(
    ("settings", "constraints", "error"),
    [
        ({}, {"prefix": "zebrafish"}, "--prefix: 'zebrafish' is not in this run's vocabulary"),
        ({}, {"require": ["two words"]}, "--require 'two words': found 2 words, expected one"),
        ({}, {"require": ["!"]}, "--require '!': found 0 words, expected one"),
        ({}, {"require": ["a", "b", "c", "d", "e"]}, "--require: "),
        ({"method": "sample"}, {"require": ["a"]}, "sampling cannot require words"),
        ({}, {"prefix": "a " * 8}, "found 8 words, expected fewer than the run's data.max_words = 8"),
    ],
    ids=str,
)
def test_constraints_that_no_caption_can_meet_are_refused(
    captioner_and_loader: tuple[Captioner, Loader], settings, constraints, error
) -> None:
    loader = captioner_and_loader[1]
    with pytest.raises(UserError) as caught:
        make_constraints(Search(**settings), loader.vocabulary, 8, **constraints)
    assert error in str(caught.value)
