from pathlib import Path

import pytest
import torch

from captionscale import toml
from captionscale.errors import UserError
from captionscale.model.captioner import Captioner
from captionscale.model.search.ensemble import Ensemble
from captionscale.tools.ensemble import open_ensemble
from captionscale.train.checkpoint_writer import CheckpointWriter
from captionscale.train.state import TrainState
from captionscale.vocab import SPECIAL_TOKENS, Vocabulary

SMALL = ("model.encoder.name=resnet18", "model.encoder.weights=none", "model.decoder.hidden_size=8")


def saved(folder: Path, name: str, *changes: str, words: tuple[str, ...] = ("a", "dog", "runs")) -> Path:
    """Write a run of one checkpoint, with random weights."""
    path = folder / f"{name}.toml"
    path.write_text('[data]\nshards = "shards"\n', encoding="utf-8")
    config, vocabulary = toml.load(path, [*SMALL, *changes]), Vocabulary(SPECIAL_TOKENS + words)
    torch.manual_seed(len(name))
    weights = Captioner(config.model, len(vocabulary)).state_dict()
    CheckpointWriter(folder / name, config, vocabulary, {}).write(TrainState(step=1), weights, {})
    return folder / name


def test_members_caption_as_one_and_are_recorded(tmp_path: Path) -> None:
    run, other = saved(tmp_path, "run"), saved(tmp_path, "other", "model.decoder.name=plain")
    alone, both, changed = (
        open_ensemble(run, others, checkpoint="best", overrides=changes)
        for others, changes in (([], []), ([other], []), ([], ["search.no_repeat_ngram_size=3"]))
    )
    assert isinstance(alone.captioner(), Captioner)
    assert isinstance(both.captioner(), Ensemble)
    assert not both.captioner().training
    assert alone.provenance() == {}
    assert [member["run"] for member in both.provenance()["members"]] == ["run", "other"]
    assert [member["model"] for member in both.provenance()["members"]] == [
        each.sha256 for each in both.checkpoints
    ]
    assert alone.sha256 == alone.checkpoints[0].sha256 != both.sha256
    # Results of another search or of other members do not take the place of the run's own.
    assert alone.search_label == "beam5"
    assert len({alone.search_label, both.search_label, changed.search_label}) == 3
    assert open_ensemble(run, [], checkpoint="best", overrides=["search.beam=3"]).search_label == "beam3"
    assert changed.config.search.no_repeat_ngram_size == 3
    assert changed.checkpoints[0].config().search.no_repeat_ngram_size == 0


def test_runs_that_cannot_caption_together_are_refused_by_name(tmp_path: Path) -> None:
    run = saved(tmp_path, "run")
    for name, other, error in (
        ("words", saved(tmp_path, "words", words=("a", "cat")), "has 6 words"),
        ("size", saved(tmp_path, "size", "data.image_size=64"), "its data.image_size is 64, that of"),
        ("long", saved(tmp_path, "long", "data.max_words=9"), "its data.max_words is 9, that of"),
    ):
        with pytest.raises(UserError, match=error) as caught:
            open_ensemble(run, [other], checkpoint="last", overrides=[])
        assert f"--ensemble {tmp_path / name}" in str(caught.value)
        assert str(run) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ("train.lr=1", "--set train.lr=1: expected a key of section search"),
        ("search", "--set search: expected a key of section search"),
        ("search.baem=3", "unknown key 'baem'; did you mean 'beam'?"),
        ("search.groups=2", "search.beam = 5 is not a multiple of search.groups = 2"),
        ("search.top_p=2", "--set search.top_p=2: top_p = 2"),
    ],
)
def test_only_the_search_can_be_changed_and_only_to_what_can_be(tmp_path: Path, change, error) -> None:
    with pytest.raises(UserError) as caught:
        open_ensemble(saved(tmp_path, "run"), [], checkpoint="best", overrides=[change])
    assert error in str(caught.value)
