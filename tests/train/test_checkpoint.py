import copy
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from experiment import tiny_config
from safetensors.torch import load_file
from torch.optim import AdamW

from captionscale.config import Config
from captionscale.distributed.engine import Engine
from captionscale.distributed.ranks import Ranks
from captionscale.errors import UserError
from captionscale.files import sha256_of
from captionscale.model.captioner import Captioner
from captionscale.train.checkpoint import find_latest, open_checkpoint, resume
from captionscale.train.checkpoint_writer import CheckpointWriter
from captionscale.train.loop import train
from captionscale.train.run_folder import MODEL_FILE, OPTIMIZER_FILE, checkpoint_steps
from captionscale.train.state import TrainState
from captionscale.version import __version__
from captionscale.vocab import SPECIAL_TOKENS, Vocabulary

VOCABULARY = Vocabulary((*SPECIAL_TOKENS, "a", "dog"))


def _stepped(config: Config) -> tuple[Captioner, Engine]:
    """Return a captioner after a step of its engine."""
    model = Captioner(config.model, len(VOCABULARY))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine = Engine(Ranks(), model, AdamW(trainable, lr=1e-2, fused=True), clip_norm=1e9)
    for parameter in trainable:
        parameter.grad = torch.randn_like(parameter)
    engine.step()
    return model, engine


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return tiny_config(tmp_path, tmp_path / "no shards are read here")


def _save(run: Path, config: Config, step: int, **train_state: Any) -> None:
    small = {"a": torch.rand(9)}
    CheckpointWriter(run, config, VOCABULARY, {"seed": 0}).write(
        TrainState(step=step, **train_state), small, small
    )


def test_a_restored_model_and_engine_take_the_same_next_step(tmp_path: Path, config: Config) -> None:
    model, engine = _stepped(config)
    tensors = model.state_dict(), engine.optimizer_state()
    CheckpointWriter(tmp_path, config, VOCABULARY, {"seed": 0}).write(TrainState(step=7), *tensors)
    other, other_engine = _stepped(config)
    saved = find_latest(tmp_path, pytest.fail)
    assert saved is not None
    assert saved.train_state.step == 7
    assert saved.vocabulary() == VOCABULARY
    assert saved.config() == config
    assert saved.fingerprint == {"seed": 0}
    other.load_state_dict(saved.weights())
    other_engine.load_optimizer_state(saved.optimizer_state())
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
        if one.requires_grad:
            one.grad = torch.ones_like(one)
            two.grad = torch.ones_like(two)
    engine.step()
    other_engine.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_the_newest_and_the_best_are_kept(tmp_path: Path, config: Config) -> None:
    for step in (1, 2, 3, 4, 5):
        _save(tmp_path, config, step, best_step=min(step, 2))
    assert config.train.keep_checkpoints == 2
    assert checkpoint_steps(tmp_path) == [2, 4, 5]
    assert open_checkpoint(tmp_path).train_state.step == 2
    assert open_checkpoint(tmp_path, "last").train_state.step == 5
    assert open_checkpoint(tmp_path, "4").train_state.step == 4


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "vocab.json", "state.json"])
def test_a_damaged_newest_checkpoint_is_skipped_with_a_warning(
    tmp_path: Path, config: Config, name: str
) -> None:
    _save(tmp_path, config, 1)
    _save(tmp_path, config, 2)
    damaged = tmp_path / "checkpoints" / "step-00000002" / name
    damaged.write_bytes(damaged.read_bytes()[:-3])
    warnings: list[str] = []
    saved = find_latest(tmp_path, warnings.append)
    assert saved is not None
    assert saved.train_state.step == 1
    assert "step-00000002: damaged checkpoint" in warnings[0]


def test_a_save_keeps_checkpoints_of_earlier_steps_not_later_damaged_ones(
    tmp_path: Path, config: Config
) -> None:
    for step in (1, 2, 9):
        _save(tmp_path, config, step)
    (tmp_path / "checkpoints" / "step-00000009" / "model.safetensors").write_bytes(b"")
    _save(tmp_path, config, 3)
    assert checkpoint_steps(tmp_path) == [2, 3]


def test_a_step_saved_again_replaces_the_damaged_checkpoint(tmp_path: Path, config: Config) -> None:
    _save(tmp_path, config, 1)
    (tmp_path / "checkpoints" / "step-00000001" / "model.safetensors").write_bytes(b"")
    _save(tmp_path, config, 1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert find_latest(tmp_path, pytest.fail) is not None


def test_a_run_captions_with_an_older_checkpoint_if_the_newest_is_damaged(
    tmp_path: Path, config: Config
) -> None:
    _save(tmp_path, config, 1)
    _save(tmp_path, config, 2)
    (tmp_path / "checkpoints" / "step-00000002" / "model.safetensors").write_bytes(b"")
    assert open_checkpoint(tmp_path).train_state.step == 1


def test_a_checkpoint_of_another_version_is_an_error_and_never_skipped(
    tmp_path: Path, config: Config
) -> None:
    for step in (1, 2):
        _save(tmp_path, config, step)
    state = tmp_path / "checkpoints" / "step-00000002" / "state.json"
    written = json.loads(state.read_text())
    state.write_text(json.dumps({**written, "format": 9, "captionscale": "7.0"}))
    for find in (
        lambda: find_latest(tmp_path, pytest.fail),
        lambda: open_checkpoint(tmp_path),
    ):
        with pytest.raises(UserError, match=r"of format 9, written by captionscale 7\.0; .* take the"):
            find()


def test_an_unknown_key_is_reported_with_the_version_that_wrote_it(tmp_path: Path, config: Config) -> None:
    _save(tmp_path, config, 1)
    folder = tmp_path / "checkpoints" / "step-00000001"
    settings, state = folder / "config.toml", folder / "state.json"
    settings.write_text("glow = 1\n" + settings.read_text())
    written = json.loads(state.read_text())
    hashes = written["sha256"] | {"config.toml": sha256_of(settings)}
    for version, error in (("7.0", "captionscale 7.0 wrote this checkpoint"), (__version__, "key 'glow'")):
        state.write_text(json.dumps({**written, "sha256": hashes, "captionscale": version}))
        with pytest.raises(UserError, match=error):
            open_checkpoint(tmp_path).config()


def test_weights_with_nan_are_refused_before_generation(tmp_path: Path, config: Config) -> None:
    weights = Captioner(config.model, len(VOCABULARY)).state_dict()
    last = list(weights)[-1]
    weights[last][0] = torch.nan
    CheckpointWriter(tmp_path, config, VOCABULARY, {}).write(TrainState(step=1), weights, {})
    with pytest.raises(UserError, match=rf"step-00000001: weights of {last} are NaN or infinite"):
        open_checkpoint(tmp_path).captioner()


def test_a_run_of_damaged_checkpoints_is_not_silently_restarted(tmp_path: Path, config: Config) -> None:
    _save(tmp_path, config, 1)
    (tmp_path / "checkpoints" / "step-00000001" / "state.json").unlink()
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        find_latest(tmp_path, lambda _: None)


@contextmanager
def _largest_file(size: int) -> Iterator[None]:
    """Limit the size of files: a larger write fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


FILES = ["model.safetensors", "optimizer.safetensors", "config.toml", "vocab.json", "state.json"]


@pytest.mark.parametrize("refused", FILES)
def test_a_full_disk_at_any_write_keeps_earlier_checkpoints(
    tmp_path: Path, config: Config, refused: str
) -> None:
    large, vocab_words = "x" * 100_000, VOCABULARY.words
    tensors = [{"a": torch.ones(25_000 if name == refused else 1)} for name in FILES[:2]]
    if refused == "config.toml":
        config = config.model_copy(update={"data": config.data.model_copy(update={"shards": large})})
    if refused == "vocab.json":
        vocab_words += (large,)
    fingerprint = {"seed": large} if refused == "state.json" else {}
    writer = CheckpointWriter(tmp_path, config, Vocabulary(vocab_words), fingerprint)
    writer.save(TrainState(step=1), *tensors)
    writer.wait()
    with _largest_file(99_999):
        writer.save(TrainState(step=2), *tensors)
        with pytest.raises(UserError, match=r"step-00000002: cannot be written .*File too large.*before it"):
            writer.wait()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    # The disk was freed.
    writer.save(TrainState(step=3), *tensors)
    writer.wait()
    assert checkpoint_steps(tmp_path) == [1, 3]
    assert find_latest(tmp_path, pytest.fail) is not None


def test_a_save_copies_the_current_tensors_and_waits_for_the_previous_save(
    tmp_path: Path, config: Config
) -> None:
    # Large enough to be still in writing; channels-last, a scalar, an empty one and one of two bytes.
    weights = {
        "large": torch.zeros(40_000_000),
        "image": torch.rand(2, 3, 5, 7).contiguous(memory_format=torch.channels_last),
        "count": torch.tensor(7),
        "half": torch.rand(3).bfloat16(),
    }
    optimizer_state = {"none": torch.empty(0), "row": torch.arange(12.0).view(3, 4).T}
    writer, train_state = (
        CheckpointWriter(tmp_path, config, VOCABULARY, {}),
        TrainState(scaler={"scale": 0.0}),
    )
    expected, took = [], 0.0
    for step, there in ((1, []), (2, [1])):
        train_state.step = step
        tensors = {name: tensor.clone() for name, tensor in (weights | optimizer_state).items()}
        expected.append((copy.deepcopy(train_state), tensors))
        took = -time.monotonic()
        writer.save(train_state, weights, optimizer_state)
        took += time.monotonic()
        # Training continues.
        train_state.step, train_state.best_score, train_state.scaler["scale"] = 99, 0.5, float(step)
        for tensor in (weights | optimizer_state).values():
            tensor += 1
        assert checkpoint_steps(tmp_path) == there, "the previous checkpoint only"
    writer.wait()
    for before, tensors in expected:
        saved = open_checkpoint(tmp_path, str(before.step))
        read = load_file(saved.folder / MODEL_FILE) | load_file(saved.folder / OPTIMIZER_FILE)
        assert saved.train_state == before
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    times = writer.pop_timings()
    assert list(times) == [1, 2]
    # `save_wait_s` includes waiting for the previous checkpoint.
    assert 0.5 * took < times[2]["save_wait_s"] <= took
    assert writer.pop_timings() == {}


def test_a_failed_write_is_reported_once_by_the_next_check_save_or_close(
    tmp_path: Path, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    writer, tensors = CheckpointWriter(tmp_path, config, VOCABULARY, {}), ({"a": torch.ones(1)}, {})
    (tmp_path / "checkpoints").write_text("a file where a folder is expected")
    refusal = "step-00000001: cannot be written"

    def check(seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert writer.pop_timings() == {}

    writer.save(TrainState(step=1), *tensors)
    with pytest.raises(UserError, match=refusal):
        check(30)
    assert writer.pop_timings() == {}
    writer.save(TrainState(step=1), *tensors)
    with pytest.raises(UserError, match=refusal):
        writer.save(TrainState(step=2), *tensors)
    writer.save(TrainState(step=1), *tensors)
    # Another error may have ended the run, which this one must not hide.
    writer.close()
    assert "warning: " in capsys.readouterr().err


@pytest.mark.usefixtures("config")
def test_a_run_killed_during_a_write_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    program = """if True:
        import sys, threading, torch
        from pathlib import Path
        from captionscale import toml
        from captionscale.train import checkpoint_writer
        from captionscale.train.state import TrainState
        from captionscale.train.checkpoint_writer import CheckpointWriter
        from captionscale.vocab import SPECIAL_TOKENS, Vocabulary
        run, real = Path(sys.argv[1]), checkpoint_writer.write_metadata

        def tear(folder, state, *others):
            if state.step == 3:
                with (folder / "model.safetensors").open("r+b") as file:
                    file.truncate(1_000)
                threading.Event().wait()
            real(folder, state, *others)

        checkpoint_writer.write_metadata = tear
        writer = CheckpointWriter(run, toml.load(run / "experiment.toml"), Vocabulary(SPECIAL_TOKENS), {})
        for step in range(1, 9):
            writer.save(TrainState(step=step), {"a": torch.full([1_000], step)}, {})
    """
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)])
    deadline = time.monotonic() + 600
    torn = tmp_path / "checkpoints" / "step-00000003.tmp" / "model.safetensors"
    while not torn.exists() or torn.stat().st_size != 1_000:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    process.wait()
    saved = find_latest(tmp_path, pytest.fail)
    assert saved is not None
    assert saved.train_state.step == 2
    assert torch.equal(load_file(saved.folder / MODEL_FILE)["a"], torch.full([1_000], 2))
    assert resume(tmp_path, {}) is not None
    assert not torn.exists()
    assert checkpoint_steps(tmp_path) == [1, 2]


def test_a_disk_too_small_for_the_checkpoints_is_refused_before_training(
    packed: Path, tmp_path: Path
) -> None:
    refusal = r"GB are free, expected .* GB more for 1,000,000,003 checkpoints of 0\.\d\d GB"
    with pytest.raises(UserError, match=refusal) as caught:
        train(tiny_config(tmp_path, packed, "train.keep_checkpoints=1000000000"), tmp_path / "run")
    assert "lower train.keep_checkpoints, or take --out elsewhere" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_reserved_buffer_has_the_size_of_a_checkpoint(tmp_path: Path) -> None:
    # Large next to the headers of the files.
    config = tiny_config(tmp_path, tmp_path, "model.decoder.hidden_size=512")
    model, engine = _stepped(config)
    writer = CheckpointWriter(tmp_path, config, VOCABULARY, {})
    writer.reserve(model)
    reserved = writer._buffer.data_ptr(), len(writer._buffer)
    writer.save(TrainState(step=1), model.state_dict(), engine.optimizer_state())
    writer.wait()
    assert (writer._buffer.data_ptr(), len(writer._buffer)) == reserved
    files = (tmp_path / "checkpoints").glob("*/*.safetensors")
    assert sum(path.stat().st_size for path in files) == pytest.approx(reserved[1], rel=0.01)


def test_a_partial_checkpoint_of_a_killed_run_is_no_checkpoint(tmp_path: Path, config: Config) -> None:
    _save(tmp_path, config, 1)
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "step-00000001", folder / "step-00000002.tmp")
    assert checkpoint_steps(tmp_path) == [1]
    _save(tmp_path, config, 2)
    assert checkpoint_steps(tmp_path) == [1, 2]


def test_a_checkpoint_being_replaced_survives_a_kill(tmp_path: Path, config: Config) -> None:
    _save(tmp_path, config, 1)
    folder = tmp_path / "checkpoints" / "step-00000001"
    shutil.copytree(folder, folder.with_name("step-00000001.tmp"))
    folder.rename(folder.with_name("step-00000001.old.tmp"))
    saved = resume(tmp_path, {"seed": 0})
    assert saved is not None
    assert [path.name for path in folder.parent.iterdir()] == ["step-00000001"]


def test_a_copy_kept_by_a_user_is_no_checkpoint(tmp_path: Path, config: Config) -> None:
    _save(tmp_path, config, 1)
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "step-00000001", folder / "step-00000001-before-lr-2")
    _save(tmp_path, config, 2)
    assert checkpoint_steps(tmp_path) == [1, 2]


def test_a_folder_without_a_run_is_an_error_with_the_expected_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint, so no run; expected the --out of captionscale train"):
        open_checkpoint(tmp_path)


def test_a_step_without_a_checkpoint_is_an_error_that_lists_the_steps(tmp_path: Path, config: Config) -> None:
    _save(tmp_path, config, 3)
    with pytest.raises(UserError, match=r"no checkpoint of step 9; there are \[3\]"):
        open_checkpoint(tmp_path, "9")
    with pytest.raises(UserError, match="expected best, last, or a step"):
        open_checkpoint(tmp_path, "newest")
