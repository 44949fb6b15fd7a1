import errno
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from experiment import tiny
from torch.optim import AdamW

from captionscale.config import Config
from captionscale.engine import Engine
from captionscale.errors import UserError
from captionscale.model.captioner import Captioner
from captionscale.ranks import Ranks
from captionscale.train import checkpoint
from captionscale.train.checkpoint import Standing
from captionscale.vocab import SPECIALS, Vocabulary

VOCABULARY = Vocabulary((*SPECIALS, "a", "dog"))


def _moved(config: Config) -> tuple[Captioner, Engine]:
    """Return a captioner after a step of its engine."""
    model = Captioner(config.model, len(VOCABULARY))
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine = Engine(Ranks(), model, AdamW(learning, lr=1e-2, fused=True), clip_norm=1e9)
    for parameter in learning:
        parameter.grad = torch.randn_like(parameter)
    engine.update()
    return model, engine


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return tiny(tmp_path, tmp_path / "no shards are read here")


def _save(run: Path, config: Config, step: int, **standing: Any) -> tuple[Captioner, Engine]:
    model, engine = _moved(config)
    tensors = model.state_dict(), engine.memory()
    checkpoint.save(run, Standing(step=step, **standing), {"seed": 0}, *tensors, config, VOCABULARY)
    return model, engine


def test_a_restored_model_and_engine_take_the_same_next_step(tmp_path: Path, config: Config) -> None:
    model, engine = _save(tmp_path, config, 7)
    other, other_engine = _moved(config)
    saved = checkpoint.newest(tmp_path, pytest.fail)
    assert saved is not None
    assert saved.standing.step == 7
    assert saved.vocabulary() == VOCABULARY
    assert saved.config() == config
    saved.refuse_another({"seed": 0})
    other.load_state_dict(saved.weights())
    other_engine.load_memory(saved.memory())
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
        if one.requires_grad:
            one.grad = torch.ones_like(one)
            two.grad = torch.ones_like(two)
    engine.update()
    other_engine.update()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_the_newest_and_the_best_are_kept(tmp_path: Path, config: Config) -> None:
    for step in (1, 2, 3, 4, 5):
        _save(tmp_path, config, step, best_step=min(step, 2))
    assert config.train.keep == 2
    assert checkpoint.steps(tmp_path) == [2, 4, 5]
    assert checkpoint.open_run(tmp_path).standing.step == 2
    assert checkpoint.open_run(tmp_path, "last").standing.step == 5
    assert checkpoint.open_run(tmp_path, "4").standing.step == 4


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "vocab.json", "state.json"])
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(
    tmp_path: Path, config: Config, name: str
) -> None:
    _save(tmp_path, config, 1)
    _save(tmp_path, config, 2)
    damaged = tmp_path / "checkpoints" / "step-00000002" / name
    damaged.write_bytes(damaged.read_bytes()[:-3])
    warnings: list[str] = []
    saved = checkpoint.newest(tmp_path, warnings.append)
    assert saved is not None
    assert saved.standing.step == 1
    assert "step-00000002: damaged checkpoint" in warnings[0]


def test_saving_before_a_damaged_checkpoint_keeps_what_is_saved(tmp_path: Path, config: Config) -> None:
    for step in (1, 2, 9):
        _save(tmp_path, config, step)
    (tmp_path / "checkpoints" / "step-00000009" / "model.safetensors").write_bytes(b"")
    _save(tmp_path, config, 3)
    assert checkpoint.steps(tmp_path) == [2, 3]


def test_a_damaged_newest_checkpoint_does_not_keep_a_run_from_captioning(
    tmp_path: Path, config: Config
) -> None:
    _save(tmp_path, config, 1)
    _save(tmp_path, config, 2)
    (tmp_path / "checkpoints" / "step-00000002" / "model.safetensors").write_bytes(b"")
    assert checkpoint.open_run(tmp_path).standing.step == 1


def test_a_run_of_damaged_checkpoints_is_not_silently_started_again(tmp_path: Path, config: Config) -> None:
    _save(tmp_path, config, 1)
    (tmp_path / "checkpoints" / "step-00000001" / "state.json").unlink()
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        checkpoint.newest(tmp_path, lambda _: None)


def test_a_full_disk_costs_no_earlier_checkpoint(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    _save(tmp_path, config, 1)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match=r"No space left on device.*the checkpoints before it are whole"):
        _save(tmp_path, config, 2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert checkpoint.newest(tmp_path, pytest.fail) is not None


def test_what_a_kill_left_behind_is_no_checkpoint(tmp_path: Path, config: Config) -> None:
    _save(tmp_path, config, 1)
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "step-00000001", folder / "step-00000002.tmp")
    assert checkpoint.steps(tmp_path) == [1]
    _save(tmp_path, config, 2)
    assert checkpoint.steps(tmp_path) == [1, 2]


def test_a_folder_without_a_run_says_what_was_wanted(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint, so no run; wanted the --out of captionscale train"):
        checkpoint.open_run(tmp_path)


def test_a_step_without_a_checkpoint_names_those_that_are_there(tmp_path: Path, config: Config) -> None:
    _save(tmp_path, config, 3)
    with pytest.raises(UserError, match=r"no checkpoint of step 9; there are \[3\]"):
        checkpoint.open_run(tmp_path, "9")
    with pytest.raises(UserError, match="wanted best, last, or a step"):
        checkpoint.open_run(tmp_path, "newest")
