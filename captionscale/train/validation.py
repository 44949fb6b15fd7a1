"""Validation: all ranks generate captions, which are scored while training continues."""

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
_POLL_S = 0.2


class Validation:
    """Generates captions of the validation split, and has them scored.

    Scores are logged when they are ready, but count at fixed steps, the next validation or the end of the
    run: neither early stopping nor the best checkpoint depends on the speed of scoring.
    """

    def __init__(self, run: Run, log: LogWriter | None, bar: Bar, watchdog: Watchdog):
        """Begin, and score what an earlier process left unscored."""
        self._run, self._state = run, run.train_state
        self._log, self._bar, self._watchdog = log, bar, watchdog
        self._logged_step = self._state.scored_step
        self._scorer: BackgroundScorer | None = None
        # Before the first epoch, not after it.
        run.ranks.run_on_main(find_java)
        run.ranks.run_on_main(lambda: [each.name for each in resolve([run.config.train.score_metric])])
        if self._is_pending and (error := run.ranks.run_on_main(self._resume)):
            bar.say(f"warning: {error}; step {self._state.validated_step:,} will have no scores")
            self._state.validated_step = self._state.scored_step

    @property
    def _is_pending(self) -> bool:
        """Whether there are captions whose scores have not counted yet."""
        return self._state.scored_step < self._state.validated_step

    @property
    def out_of_patience(self) -> bool:
        """Whether training must stop, as scores have not improved."""
        return self._state.scores_since_best >= self._run.config.train.patience

    def run(self) -> bool:
        """Run the validation due after this step.

        Returns:
            Whether it was completed; if not, a rank was asked to stop, and the resumed run does it again.

        Raises:
            UserError: The first captions of a run could not be scored; later ones are skipped with a warning.
        """
        last = self._state.step == self._run.steps
        if not self._collect_scores():
            return False
        if not last and self.out_of_patience:
            return True
        if self._state.validated_step < self._state.step and not self._caption():
            return False
        return not last or self._collect_scores()

    def log_scores(self) -> None:
        """Log pending scores that are ready, with the step of their captions."""
        step = self._state.validated_step
        if self._scorer is None or not self._is_pending or self._logged_step == step:
            return
        try:
            scores = self._scorer.result()
        except UserError:
            return  # `_collect_scores` reports it.
        if scores is not None:
            self._logged_step = step
            figures = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
            self._bar.say(f"step {step:,}  {figures}")
            if self._log:
                self._log.write(step, scores=scores)

    def close(self) -> None:
        """Stop scoring; a resumed run does it again."""
        if self._scorer is not None:
            self._scorer.close()

    def _collect_scores(self) -> bool:
        """Wait for the pending scores and let them count; return whether no rank was asked to stop."""
        if not self._is_pending:
            return True
        with self._watchdog.busy("scoring"):
            scores = self._run.ranks.run_on_main(self._wait)
        if scores is None:
            return False
        if scores:
            metric = self._run.config.train.score_metric
            self._state.record_score(self._state.validated_step, scores[metric])
        else:
            self._state.scored_step = self._state.validated_step
        return True

    def _wait(self) -> dict[str, float] | None:
        """Return scores; None if this rank is asked to stop, empty if scoring failed."""
        assert self._scorer is not None
        try:
            while (scores := self._scorer.result(_POLL_S)) is None:
                if preemption.requested():
                    return None
        except UserError as error:
            if not self._state.best_step:
                raise
            self._bar.say(f"warning: step {self._state.validated_step:,} has no scores: {error}")
            return {}
        self.log_scores()
        return scores

    def _caption(self) -> bool:
        """Caption the split and submit the captions; return whether no rank was asked to stop."""

        def should_stop() -> bool:
            self._watchdog.beat()
            return preemption.requested()

        run, captioner = self._run, self._run.captioner
        # Greedy search is five times as fast and ranks checkpoints alike.
        settings = run.config.with_beam(1).search
        run.ranks.broadcast_buffers_from_main(captioner)
        with run.ema.average_parameters() if run.ema else nullcontext():
            # Again, as the averages include batch statistics.
            run.ranks.broadcast_buffers_from_main(captioner)
            results = caption_split(
                captioner, run.val_loader, settings, run.ranks, "validation", should_stop=should_stop
            )
        if results is None:
            return False
        self._state.validated_step = self._state.step
        run.ranks.run_on_main(self._submit, results)
        return True

    def _submit(self, results: list[Result]) -> None:
        write_results(results, self._captions_file)
        self._score({each["image_id"]: each["caption"] for each in results})

    def _resume(self) -> str:
        """Score the captions that an earlier process wrote; return the reason if that is impossible."""
        try:
            captions = read_results(self._captions_file)
        except UserError as error:
            return str(error)
        if set(captions) != set(self._run.val_loader.split.index["image_id"].tolist()):
            return f"{self._captions_file}: not the captions of the validation split"
        self._score(captions)
        return ""

    @property
    def _captions_file(self) -> Path:
        return captions_file(self._run.folder, self._state.validated_step)

    def _score(self, captions: Mapping[int, str]) -> None:
        if self._scorer is None:
            # METEOR takes more time and memory than the others together.
            metrics = dict.fromkeys((*_METRICS, self._run.config.train.score_metric))
            self._scorer = BackgroundScorer(self._run.val_loader.split.references(), list(metrics))
        self._scorer.submit(captions)
