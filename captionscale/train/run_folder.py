"""Names in a run's folder; imports no torch."""

import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from captionscale.errors import UserError

LOG_FILE = "log.jsonl"
CONFIG_FILE = "config.toml"
"""Of the run, written when it starts or resumes; each checkpoint has its own."""
STALLS_FILE = "stalls.jsonl"
JOB_SCRIPT, JOB_CONFIG = "job.sbatch", "job.toml"
"""Written by `captionscale submit`."""
MODEL_FILE, OPTIMIZER_FILE, EMA_FILE = "model.safetensors", "optimizer.safetensors", "ema.safetensors"
STATE_FILE, VOCAB_FILE = "state.json", "vocab.json"
"""Other files of a checkpoint."""
OLD_SUFFIX = ".old.tmp"
"""Of a checkpoint while another one of the same step replaces it."""
_CHECKPOINTS, _VALIDATION, _STEP = "checkpoints", "validation", "step-"
# No superfluous zeros: each step has one name.
_NUMBER = r"(?P<step>[0-9]{8}|[1-9][0-9]{8,11})"
_CHECKPOINT_NAME = re.compile(_STEP + _NUMBER)
_PARTIAL_NAME = re.compile(rf"{_STEP}{_NUMBER}(\.old)?\.tmp")
_CAPTIONS_NAME = re.compile(rf"{_STEP}{_NUMBER}\.json")


def checkpoints_folder(run: Path) -> Path:
    """Return the folder of a run's checkpoints."""
    return run / _CHECKPOINTS


def checkpoint_folder(run: Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step."""
    return run / _CHECKPOINTS / f"{_STEP}{step:08d}"


def captions_file(run: Path, step: int) -> Path:
    """Return the file of a validation's captions."""
    return run / _VALIDATION / f"{_STEP}{step:08d}.json"


def checkpoint_steps(run: Path) -> list[int]:
    """Return the steps of a run's checkpoints, ascending."""
    return [*_by_step(checkpoints_folder(run), _CHECKPOINT_NAME)]


def validation_files(run: Path) -> dict[int, Path]:
    """Return the files of captions by step, ascending."""
    return _by_step(run / _VALIDATION, _CAPTIONS_NAME)


def remove_partial_checkpoints(run: Path) -> None:
    """Remove checkpoints that a killed process was writing, and those no longer kept."""
    for path in _entries(checkpoints_folder(run)):
        if not _PARTIAL_NAME.fullmatch(path.name):
            continue
        whole = path.with_name(path.name.removesuffix(OLD_SUFFIX))
        if path.name.endswith(OLD_SUFFIX) and not whole.exists():
            # Its replacement was never completed.
            with suppress(OSError):
                path.rename(whole)
            continue
        # On NFS a folder stays while another process reads in it; the next save tries again.
        shutil.rmtree(path, ignore_errors=True)


def unknown_file_warnings(run: Path) -> Iterator[str]:
    """Yield a line for each folder with files that training did not write."""
    for folder, patterns in (
        (checkpoints_folder(run), (_CHECKPOINT_NAME, _PARTIAL_NAME)),
        (run / _VALIDATION, (_CAPTIONS_NAME,)),
    ):
        names = sorted(path.name for path in _entries(folder))
        if unknown := [name for name in names if not any(each.fullmatch(name) for each in patterns)]:
            more = f" and {len(unknown) - 1:,} more" if len(unknown) > 1 else ""
            yield f"{folder}: skipped {unknown[0]!r:.80}{more}, which training did not write"


def _entries(folder: Path) -> list[Path]:
    return [*folder.iterdir()] if folder.is_dir() else []


def _by_step(folder: Path, pattern: re.Pattern[str]) -> dict[int, Path]:
    """Return the entries that training wrote; a user may keep copies next to them."""
    found = {int(name["step"]): path for path in _entries(folder) if (name := pattern.fullmatch(path.name))}
    return dict(sorted(found.items()))


def require_run(run: Path) -> None:
    """Refuse a path that is not a folder, before long work.

    Raises:
        UserError: No folder.
    """
    if not run.is_dir():
        found = "is a file" if run.exists() else "no such folder"
        raise UserError(f"{run}: {found}, expected the --out of captionscale train; correct the path")
