"""What a report reads of a run: log, validations, newest checkpoint, receipts and shards."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from captionscale.config import Config
from captionscale.data.shards import Split
from captionscale.data.storage import open_storage
from captionscale.errors import UserError
from captionscale.escape import for_shell
from captionscale.score.receipt import Receipt
from captionscale.train import run_folder
from captionscale.train.checkpoint import open_checkpoint
from captionscale.train.log_reader import RunLog
from captionscale.train.run_folder import LOG_FILE, checkpoint_steps, require_run

T = TypeVar("T")


class RunArtifacts:
    """What can be read of a run that may be training, incomplete or of another version."""

    def __init__(self, folder: Path, shards: str | None):
        """Read a run, with other shards than its own if these are given; raises UserError if it is no run."""
        require_run(folder)
        self.folder, self.shards = folder, shards
        self.name = folder.resolve().name
        self.missing: list[str] = []
        """What could not be read, and why."""
        if not (folder / LOG_FILE).is_file() and not checkpoint_steps(folder):
            raise UserError(
                f"{folder}: no checkpoint and no {LOG_FILE}, expected the --out of captionscale train;"
                " correct the path"
            )
        self.log = self.try_load(lambda: RunLog(folder))
        self.validations = run_folder.validation_files(folder)
        """The captions file of each scored step of the validation split."""
        if self.log and self.log.warning:
            self.missing.append(self.log.warning)
        self.missing += run_folder.unknown_file_warnings(folder)
        self.checkpoint = self.try_load(lambda: open_checkpoint(folder))
        self.config: Config | None = self.try_load(self.checkpoint.config) if self.checkpoint else None
        found = [self.try_load(partial(Receipt.read, path)) for path in sorted(folder.rglob("receipt.json"))]
        self.receipts = sorted(filter(None, found), key=lambda receipt: str(receipt.environment.get("time")))

    def try_load(self, work: Callable[[], T]) -> T | None:
        """Return the result of `work`, or None after noting its `UserError` as missing."""
        try:
            return work()
        except UserError as error:
            self.missing.append(str(error))
            return None

    def split(self, name: str) -> Split | None:
        """Return a split of the run's shards, if they can be opened."""
        if self.config is None:
            return None
        data, shards = self.config.data, self.shards or self.config.data.shards
        return self.try_load(lambda: Split(open_storage(shards, data.cache, data.cache_gb), name))

    def metric(self, key: str) -> dict[int, float]:
        """Return the values of one log key by step."""
        return self.log.metric(key) if self.log else {}

    @property
    def scored_splits(self) -> list[str]:
        """The splits with receipts, the latest first."""
        return list(dict.fromkeys(str(each.provenance.get("split", "?")) for each in reversed(self.receipts)))

    def score_command(self, split: str = "") -> str:
        """Return the command that scores this run, on its validation split by default."""
        split = split or (self.config.data.val_split if self.config else "val")
        return for_shell("captionscale", "score", str(self.folder), "--split", split)
