"""Where things lie in a run's folder; who looks for them needs no torch."""

from pathlib import Path

from captionscale.errors import UserError

LOG = "log.jsonl"
SETTINGS = "config.toml"
"""What a run is being trained with, written when it starts or goes on; each checkpoint has its own one."""
STALLS = "stalls.jsonl"
MODEL, OPTIMIZER, AVERAGE, STATE, VOCAB = (
    "model.safetensors",
    "optimizer.safetensors",
    "average.safetensors",
    "state.json",
    "vocab.json",
)
"""What else is in each checkpoint's folder."""
_CHECKPOINTS, _STEP = "checkpoints", "step-"


def checkpoints(run: Path) -> Path:
    """Return the folder of a run's checkpoints, whole and passing ones."""
    return run / _CHECKPOINTS


def checkpoint_of(run: Path, step: int) -> Path:
    """Return the folder of a run's checkpoint of a step."""
    return run / _CHECKPOINTS / f"{_STEP}{step:08d}"


def steps(run: Path) -> list[int]:
    """Return the steps of which a run has checkpoints, in their order."""
    names = (path.name.removeprefix(_STEP) for path in checkpoints(run).glob(f"{_STEP}*"))
    # A user may keep a copy of one under a name of his own.
    return sorted(int(name) for name in names if name.isdecimal())


def need_run(run: Path) -> None:
    """Refuse what is no folder, before long work.

    Raises:
        UserError: It is none.
    """
    if not run.is_dir():
        found = "is a file" if run.exists() else "no such folder"
        raise UserError(f"{run}: {found}, wanted the --out of captionscale train; correct the path")
