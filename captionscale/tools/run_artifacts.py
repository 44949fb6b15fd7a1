"""What there is of a run to tell people of, whatever state it is in."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from captionscale.config import Config
from captionscale.data.shards import Split
from captionscale.data.storage import open_storage
from captionscale.errors import UserError
from captionscale.score.receipt import Receipt
from captionscale.train import run_folder
from captionscale.train.checkpoints import open_checkpoint
from captionscale.train.log_reader import RunLog
from captionscale.train.run_folder import LOG_FILE, checkpoint_steps, require_run

T = TypeVar("T")


class RunArtifacts:
    """What there is of a run, which may be at work, half-written or of another version."""

    def __init__(self, folder: Path, shards: str | None):
        """Look at a run.

        Args:
            folder: The run's.
            shards: Instead of the run's own.

        Raises:
            UserError: There is nothing of a run.
        """
        require_run(folder)
        self.folder = folder
        self.name = folder.resolve().name
        self.missing: list[str] = []
        if not (folder / LOG_FILE).is_file() and not checkpoint_steps(folder):
            raise UserError(
                f"{folder}: no checkpoint and no {LOG_FILE}, so no run; wanted the --out of captionscale train;"
                " correct the path"
            )
        self.log = self.try_load(lambda: RunLog(folder))
        self.validations = run_folder.validation_files(folder)
        """The captions of each scored step of the validation split."""
        self.missing += [
            *filter(None, [self.log.warning if self.log else ""]),
            *run_folder.unknown_file_warnings(folder),
        ]
        self.checkpoint = self.try_load(lambda: open_checkpoint(folder))
        saved = self.checkpoint
        self.config: Config | None = self.try_load(saved.config) if saved else None
        found = [self.try_load(partial(Receipt.read, path)) for path in sorted(folder.rglob("receipt.json"))]
        self.receipts = sorted(filter(None, found), key=lambda receipt: str(receipt.environment.get("time")))
        self.shards = shards

    def try_load(self, work: Callable[[], T]) -> T | None:
        """Return what can be had; of what cannot, the reason becomes a part of the page."""
        try:
            return work()
        except UserError as error:
            self.missing.append(str(error))
            return None

    def split(self, name: str) -> Split | None:
        """Return a split of the run's shards, if they are at hand."""
        if self.config is None:
            return None
        data = self.config.data
        shards = self.shards or data.shards
        return self.try_load(lambda: Split(open_storage(shards, data.cache, data.cache_gb), name))

    def metric(self, key: str) -> dict[int, float]:
        """Return one figure of the log by step."""
        return self.log.metric(key) if self.log else {}
