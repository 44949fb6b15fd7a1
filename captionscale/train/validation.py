"""Validation: all ranks write captions, and training goes on while they are scored."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

from captionscale.errors import UserError
from captionscale.progress import Bar
from captionscale.score.java import find_java
from captionscale.score.metrics import resolve
from captionscale.score.results import Result, read_results, write_results
from captionscale.score.worker import BackgroundScorer
from captionscale.train import preemption
from captionscale.train.generation import caption_split
from captionscale.train.log_writer import LogWriter
from captionscale.train.run_folder import captions_file
from captionscale.train.setup import Run
from captionscale.train.watchdog import Watchdog

_METRICS = ("BLEU-4", "ROUGE-L", "CIDEr-D")
_LOOK_S = 0.2


class Validation:
    """Captions of the validation split, and what they are worth.

    Scores reach the log as soon as they are there. They count at fixed steps, which are the next validation
    and the end of the run: so neither early stopping nor the best checkpoint depends on how fast that was.
    """

    def __init__(self, job: Run, log: LogWriter | None, bar: Bar, watchdog: Watchdog):
        """Take up what an earlier process left unscored.

        Args:
            job: The run, of which this changes `train_state`.
            log: On rank 0.
            bar: For what people are told.
            watchdog: Is told that waiting for scores may take long.
        """
        self._job, self._log, self._bar, self._watchdog = job, log, bar, watchdog
        self._told = job.train_state.scored_step
        self._scorer: BackgroundScorer | None = None
        # Not after an epoch in vain.
        job.ranks.run_on_main(find_java)
        job.ranks.run_on_main(lambda: [each.name for each in resolve([job.config.train.score_metric])])
        if self._owed and (fault := job.ranks.run_on_main(self._take_up)):
            bar.say(f"warning: {fault}; step {job.train_state.validated_step:,} will have no scores")
            job.train_state.validated_step = job.train_state.scored_step

    @property
    def _owed(self) -> bool:
        """Whether captions were written whose scores have not counted yet."""
        return self._job.train_state.scored_step < self._job.train_state.validated_step

    def run(self) -> bool:
        """Do what a step is to end with that is followed by a validation.

        Returns:
            Whether that was done: who is asked to leave breaks it off, and whoever goes on does it again.
        """
        train_state = self._job.train_state
        last = train_state.step == self._job.steps
        if not self.collect_scores():
            return False
        if not last and self.out_of_patience:
            return True
        if train_state.validated_step < train_state.step and not self._caption():
            return False
        return not last or self.collect_scores()

    @property
    def out_of_patience(self) -> bool:
        """Whether scores have not risen for so long that training is to stop."""
        return self._job.train_state.scores_since_best >= self._job.config.train.patience

    def collect_scores(self) -> bool:
        """Let the scores count that were begun last; wait for them if need be.

        Returns:
            As `run`.

        Raises:
            UserError: The very first captions could not be scored. Later a warning does: nobody wants a long
                run to end for that, and its captions are kept.
        """
        if not self._owed:
            return True
        train_state = self._job.train_state
        with self._watchdog.busy("scoring"):
            scores = self._job.ranks.run_on_main(self._wait)
        if scores is None:
            return False
        if scores:
            train_state.record_score(train_state.validated_step, scores[self._job.config.train.score_metric])
        else:
            train_state.scored_step = train_state.validated_step
        return True

    def log_scores(self) -> None:
        """Log the scores that have come meanwhile, with the step that they belong to."""
        step = self._job.train_state.validated_step
        if self._scorer is None or not self._owed or self._told == step:
            return
        try:
            scores = self._scorer.result()
        except UserError:
            return  # `collect_scores` tells.
        if scores is not None:
            self._told = step
            figures = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
            self._bar.say(f"step {step:,}  {figures}")
            if self._log:
                self._log.write(step, scores=scores)

    def close(self) -> None:
        """Give up what is being scored: a run that goes on does it again."""
        if self._scorer is not None:
            self._scorer.close()

    def _caption(self) -> bool:
        def should_stop() -> bool:
            self._watchdog.beat()
            return preemption.requested()

        job = self._job
        # Greedy: five times as fast, and the order of checkpoints is the same.
        settings = job.config.with_beam(1).search
        job.ranks.broadcast_buffers_from_main(job.captioner)
        with job.ema.average_parameters() if job.ema else nullcontext():
            # The averages of batch statistics too.
            job.ranks.broadcast_buffers_from_main(job.captioner)
            results = caption_split(
                job.captioner,
                job.val_loader,
                settings,
                job.ranks,
                "validation",
                should_stop=should_stop,
            )
        if results is None:
            return False
        job.train_state.validated_step = job.train_state.step
        job.ranks.run_on_main(self._hand_over, results)
        return True

    def _hand_over(self, results: list[Result]) -> None:
        """Write captions, and have them scored."""
        write_results(results, self._captions)
        self._begin({each["image_id"]: each["caption"] for each in results})

    @property
    def _captions(self) -> Path:
        return captions_file(self._job.folder, self._job.train_state.validated_step)

    def _take_up(self) -> str:
        """Hand over the captions that an earlier process wrote; return why that cannot be, if it cannot."""
        try:
            written = read_results(self._captions)
        except UserError as error:
            return str(error)
        if set(written) != set(self._job.val_loader.split.index["image_id"].tolist()):
            return f"{self._captions}: not the captions of the validation split"
        self._begin(written)
        return ""

    def _begin(self, captions: Mapping[int, str]) -> None:
        """Hand over captions."""
        if self._scorer is None:
            # METEOR takes more time and memory than all others together, so only on request.
            metrics = dict.fromkeys((*_METRICS, self._job.config.train.score_metric))
            self._scorer = BackgroundScorer(self._job.val_loader.split.references(), list(metrics))
        self._scorer.submit(captions)

    def _wait(self) -> dict[str, float] | None:
        """Return scores; none if this rank is asked to leave, empty ones if there will be none."""
        assert self._scorer is not None
        try:
            while (scores := self._scorer.result(_LOOK_S)) is None:
                if preemption.requested():
                    return None
        except UserError as error:
            if not self._job.train_state.best_step:
                raise
            self._bar.say(f"warning: step {self._job.train_state.validated_step:,} has no scores: {error}")
            return {}
        self.log_scores()
        return scores
