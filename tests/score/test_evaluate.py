from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from experiment import tiny

from captionscale.config import Search
from captionscale.data.loader import Loader
from captionscale.data.shards import Split
from captionscale.model.captioner import Captioner
from captionscale.ranks import Ranks
from captionscale.score.evaluate import caption_split
from captionscale.vocab import build


class OneOf(Ranks):
    """A rank of several whose peers' results are handed in, to see one rank's share alone."""

    def __init__(self, rank: int, size: int):
        super().__init__()
        self.rank, self.size = rank, size


@pytest.fixture
def captioner_and_loader(packed: Path, tmp_path: Path) -> tuple[Captioner, Loader]:
    config = tiny(tmp_path, packed)
    split = Split(packed, "val")
    vocabulary = build((caption for each in split.references().values() for caption in each), 1, None)
    return Captioner(config.model, len(vocabulary)), Loader(split, vocabulary, config.data)


@pytest.mark.parametrize("size", [1, 3, 8, 11])
def test_ranks_caption_every_image_once_and_as_one_rank_does(
    captioner_and_loader: tuple[Captioner, Loader], monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    captioner, loader = captioner_and_loader
    alone = caption_split(captioner, loader, Search(beam=2, batch=3), Ranks(), "alone")
    shares: list[list[dict[str, object]]] = []
    monkeypatch.setattr(OneOf, "gather", lambda _, items: shares.append(items) or items)
    # One share alone is not the whole split, and is refused as such.
    refused = nullcontext() if size == 1 else pytest.raises(AssertionError, match="twice or not at all")
    for rank in range(size):
        with refused:
            caption_split(captioner, loader, Search(beam=2, batch=3), OneOf(rank, size), "share")
    together = [result for share in shares for result in share]
    assert sorted(together, key=lambda result: result["image_id"]) == alone
    assert max(map(len, shares)) - min(map(len, shares)) <= 3


def test_captioning_leaves_the_captioner_in_its_mode(
    captioner_and_loader: tuple[Captioner, Loader],
) -> None:
    captioner, loader = captioner_and_loader
    for training in (True, False):
        captioner.train(training)
        caption_split(captioner, loader, Search(beam=1), Ranks(), "mode")
        assert captioner.training == training


def test_the_beam_batch_does_not_change_captions(captioner_and_loader: tuple[Captioner, Loader]) -> None:
    captioner, loader = captioner_and_loader
    captions = [
        caption_split(captioner, loader, Search(beam=3, batch=batch), Ranks(), "batch") for batch in (1, 8)
    ]
    assert captions[0] == captions[1]
    assert len({result["image_id"] for result in captions[0]}) == len(
        np.unique(loader.split.index["image_id"])
    )
