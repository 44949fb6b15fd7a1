"""`captionscale bench save`: how long the training loop waits for a checkpoint, beside other ways."""

import os
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import save_file
from torch.optim import AdamW

from captionscale.config import Config
from captionscale.distributed.engine import Engine
from captionscale.distributed.ranks import Ranks
from captionscale.model.captioner import Captioner
from captionscale.tools.bench.race import Heat, Way, race
from captionscale.train import checkpoints
from captionscale.train.checkpoint_writer import CheckpointWriter
from captionscale.train.state import TrainState
from captionscale.vocab import SPECIAL_TOKENS, Vocabulary

# So many words occur five times in the captions of COCO's train images, in Karpathy's split.
WORDS = 9490


def bench(config: Config, folder: Path | None, *, rounds: int) -> list[Heat]:
    """Measure saving.

    Args:
        config: The experiment, whose captioner is saved with random weights.
        folder: Where to write; None: the system's temporary folder. Its disk is part of what is measured.
        rounds: That are measured.

    Raises:
        UserError: The disk is too small.
    """
    with (
        Ranks(config.train.precision) as ranks,
        tempfile.TemporaryDirectory(dir=folder, prefix="captionscale-bench-") as name,
    ):
        return [_saving(config, Path(name), ranks, rounds)]


def _saving(config: Config, folder: Path, ranks: Ranks, rounds: int) -> Heat:
    vocabulary = Vocabulary(
        (*SPECIAL_TOKENS, *(f"word{number}" for number in range(WORDS - len(SPECIAL_TOKENS))))
    )
    captioner = Captioner(config.model, WORDS).to(ranks.device)
    learning = [parameter for parameter in captioner.parameters() if parameter.requires_grad]
    engine = Engine(ranks, captioner, AdamW(learning, fused=True), config.train.clip_norm)
    for parameter in learning:
        parameter.grad = torch.randn_like(parameter)
    engine.step()
    saver, train_state = CheckpointWriter(folder, config, vocabulary, {}), TrainState()
    saver.reserve(captioner)

    def beside() -> None:
        train_state.step += 1
        saver.save(train_state, captioner.state_dict(), engine.optimizer_state())

    def at_once() -> None:
        train_state.step += 1
        tensors = captioner.state_dict(), engine.optimizer_state()
        checkpoints.save(folder, train_state, {}, *tensors, config, vocabulary)

    def safetensors() -> None:
        for tensors, path in (
            (captioner.state_dict(), folder / "model.safetensors"),
            (engine.optimizer_state(), folder / "optimizer.safetensors"),
        ):
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
            _flush(path)

    both = folder / "both.pth"

    def pickled() -> None:
        torch.save({"model": captioner.state_dict(), "optimizer": engine.optimizer_state()}, both)

    def pickled_and_flushed() -> None:
        pickled()
        _flush(both)

    tensors = (*captioner.state_dict().values(), *engine.optimizer_state().values())
    megabytes = round(sum(tensor.nbytes for tensor in tensors) / 1e6)
    ways = [
        Way("captionscale", beside, megabytes, after=saver.wait),
        Way("captionscale, waiting until it is written", at_once, megabytes),
        Way("safetensors.save_file", safetensors, megabytes),
        Way("torch.save", pickled, megabytes, after=lambda: _flush(both)),
        Way("torch.save, and fsync", pickled_and_flushed, megabytes),
    ]
    heat = race(f"The loop waits for a checkpoint of {megabytes:,} MB", "MB", ways, rounds)
    for lane in heat.lanes:
        seconds = [megabytes / pace for pace in lane.per_second]
        heat.notes.append(
            f"{lane.name}: the loop waits {median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})."
        )
    written = median(seconds["save_s"] for seconds in saver.pop_timings().values())
    cpu = time.process_time()
    beside()
    saver.close()
    heat.notes += [
        f"Ours is then written beside the next steps: in {written:.2f} s if nothing else is done meanwhile;",
        f"copying, writing and hashing take {time.process_time() - cpu:.2f} s of processor time.",
        "All ways but torch.save alone end with their bytes on the disk (fsync); only ours hash them.",
    ]
    return heat


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
