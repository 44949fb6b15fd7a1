"""Saving a checkpoint: how long the training loop waits, next to safetensors and torch.save.

Measured gain (docs/performance.md): the loop waits 0.09 s for 420 MB, 0.15 of the time of a plain
torch.save.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

import torch
from comparison import Candidate, Table, compare, run
from safetensors.torch import save_file
from synthetic_run import COCO_WORDS
from torch.optim import AdamW

from captionscale import toml
from captionscale.config import Config
from captionscale.distributed.engine import Engine
from captionscale.distributed.ranks import Ranks
from captionscale.model.captioner import Captioner
from captionscale.train.checkpoint_writer import CheckpointWriter
from captionscale.train.state import TrainState
from captionscale.vocab import SPECIAL_TOKENS, Vocabulary

_TINY = (
    "model.encoder.name=resnet18",
    "model.encoder.trainable=none",
    "model.decoder.embed_size=16",
    "model.decoder.hidden_size=16",
)


def main(arguments: Sequence[str] | None = None) -> list[Table]:
    """Run the benchmark; return its tables."""
    parser = argparse.ArgumentParser("checkpoint.py", description="Saving a checkpoint with random weights.")
    parser.add_argument(
        "config", metavar="CONFIG", nargs="?", default="attention", help="whose model is saved"
    )
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="where to write (default: a temporary folder)"
    )
    return run(
        _measure,
        parser,
        arguments,
        full={"rounds": 5, "words": COCO_WORDS, "changes": ()},
        quick={"rounds": 3, "words": COCO_WORDS, "changes": ()},
        tiny={"rounds": 1, "words": 50, "changes": _TINY},
    )


def _measure(options: argparse.Namespace) -> Iterator[Table]:
    config = toml.load(options.config, [*options.changes])
    with (
        Ranks(config.train.precision) as ranks,
        tempfile.TemporaryDirectory(dir=options.folder, prefix="captionscale-bench-") as name,
    ):
        yield _saving(config, Path(name), ranks, options)


def _saving(config: Config, folder: Path, ranks: Ranks, options: argparse.Namespace) -> Table:
    words = options.words
    vocabulary = Vocabulary(
        (*SPECIAL_TOKENS, *(f"word{number}" for number in range(words - len(SPECIAL_TOKENS))))
    )
    captioner = Captioner(config.model, words).to(ranks.device)
    learning = [parameter for parameter in captioner.parameters() if parameter.requires_grad]
    engine = Engine(ranks, captioner, AdamW(learning, fused=True), config.train.clip_norm)
    for parameter in learning:
        parameter.grad = torch.randn_like(parameter)
    engine.step()
    saver, state = CheckpointWriter(folder, config, vocabulary, {}), TrainState()
    saver.reserve(captioner)

    def asynchronous() -> None:
        state.step += 1
        saver.save(state, captioner.state_dict(), engine.optimizer_state())

    def synchronous() -> None:
        state.step += 1
        saver.write(state, captioner.state_dict(), engine.optimizer_state())

    def safetensors() -> None:
        for tensors, path in (
            (captioner.state_dict(), folder / "model.safetensors"),
            (engine.optimizer_state(), folder / "optimizer.safetensors"),
        ):
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
            _flush(path)

    pickled = folder / "both.pth"

    def torch_save() -> None:
        torch.save({"model": captioner.state_dict(), "optimizer": engine.optimizer_state()}, pickled)

    def torch_save_and_flush() -> None:
        torch_save()
        _flush(pickled)

    tensors = (*captioner.state_dict().values(), *engine.optimizer_state().values())
    megabytes = max(1, round(sum(tensor.nbytes for tensor in tensors) / 1e6))
    candidates = [
        Candidate("captionscale", asynchronous, megabytes, after=saver.wait),
        Candidate("captionscale, waiting until it is written", synchronous, megabytes),
        Candidate("safetensors.save_file", safetensors, megabytes),
        Candidate("torch.save", torch_save, megabytes, after=lambda: _flush(pickled)),
        Candidate("torch.save and fsync", torch_save_and_flush, megabytes),
    ]
    table = compare(f"The loop waits for a checkpoint of {megabytes:,} MB", "MB", candidates, options.rounds)
    for result in table.results:
        seconds = [megabytes / rate for rate in result.per_second]
        table.notes.append(
            f"{result.name}: waits {median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})."
        )
    written = median(seconds["save_s"] for seconds in saver.pop_timings().values())
    cpu = time.process_time()
    asynchronous()
    saver.close()
    table.notes += [
        f"Ours is then written during the next steps, in {written:.2f} s if nothing else runs meanwhile;",
        f"copying, writing and hashing take {time.process_time() - cpu:.2f} s of processor time.",
        "All but torch.save alone end with their bytes on disk (fsync); only ours hash them.",
    ]
    return table


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


if __name__ == "__main__":
    main()
