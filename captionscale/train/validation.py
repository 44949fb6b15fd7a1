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

    Scores are logged as soon as they are ready, but count at fixed steps, the next validation or the end of
    the run: neither early stopping nor the best checkpoint depends on the speed of scoring.
    """

    def __init__(self, run: Run, log: LogWriter | None, bar: Bar, watchdog: Watchdog):
        """Begin, and score what an earlier process left unscored."""
        self._run, self._log, self._bar, self._watchdog = run, log, bar, watchdog
        self._logged_step = run.train_state.scored_step
        self._scorer: BackgroundScorer | None = None
        # Before the first epoch, not after it.
        run.ranks.run_on_main(find_java)
        run.ranks.run_on_main(lambda: [each.name for each in resolve([run.config.train.score_metric])])
        if self._pending and (fault := run.ranks.run_on_main(self._resume)):
            bar.say(f"warning: {fault}; step {run.train_state.validated_step:,} will have no scores")
            run.train_state.validated_step = run.train_state.scored_step

    @property
    def _pending(self) -> bool:
        """Whether there are captions whose scores have not counted yet."""
        return self._run.train_state.scored_step < self._run.train_state.validated_step

    def run(self) -> bool:
        """Run the validation due after this step.

        Returns:
            Whether it was completed; if not, a rank was asked to stop, and the resumed run does it again.
        """
        train_state = self._run.train_state
        last = train_state.step == self._run.steps
        if not self.collect_scores():
            return False
        if not last and self.out_of_patience:
            return True
        if train_state.validated_step < train_state.step and not self._caption():
            return False
        return not last or self.collect_scores()

    @property
    def out_of_patience(self) -> bool:
        """Whether training must stop, as scores have not improved."""
        return self._run.train_state.scores_since_best >= self._run.config.train.patience

    def collect_scores(self) -> bool:
        """Wait for the pending scores and let them count.

        Returns:
            As `run`.

        Raises:
            UserError: The first captions of a run could not be scored; later ones are skipped with a warning.
        """
        if not self._pending:
            return True
        train_state = self._run.train_state
        with self._watchdog.busy("scoring"):
            scores = self._run.ranks.run_on_main(self._wait)
        if scores is None:
            return False
        if scores:
            train_state.record_score(train_state.validated_step, scores[self._run.config.train.score_metric])
        else:
            train_state.scored_step = train_state.validated_step
        return True

    def log_scores(self) -> None:
        """Log pending scores that are ready, with the step of their captions."""
        step = self._run.train_state.validated_step
        if self._scorer is None or not self._pending or self._logged_step == step:
            return
        try:
            scores = self._scorer.result()
        except UserError:
            return  # `collect_scores` reports it.
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

    def _caption(self) -> bool:
        def should_stop() -> bool:
            self._watchdog.beat()
            return preemption.requested()

        run = self._run
        # Greedy search is five times as fast and ranks checkpoints alike.
        settings = run.config.with_beam(1).search
        run.ranks.broadcast_buffers_from_main(run.captioner)
        with run.ema.average_parameters() if run.ema else nullcontext():
            # Again, as the averages include batch statistics.
            run.ranks.broadcast_buffers_from_main(run.captioner)
            results = caption_split(
                run.captioner,
                run.val_loader,
                settings,
                run.ranks,
                "validation",
                should_stop=should_stop,
            )
        if results is None:
            return False
        run.train_state.validated_step = run.train_state.step
        run.ranks.run_on_main(self._score, results)
        return True

    def _score(self, results: list[Result]) -> None:
        """Write captions, and submit them for scoring."""
        write_results(results, self._captions)
        self._submit({each["image_id"]: each["caption"] for each in results})

    @property
    def _captions(self) -> Path:
        return captions_file(self._run.folder, self._run.train_state.validated_step)

    def _resume(self) -> str:
        """Submit the captions that an earlier process wrote; return the reason if that is impossible."""
        try:
            written = read_results(self._captions)
        except UserError as error:
            return str(error)
        if set(written) != set(self._run.val_loader.split.index["image_id"].tolist()):
            return f"{self._captions}: not the captions of the validation split"
        self._submit(written)
        return ""

    def _submit(self, captions: Mapping[int, str]) -> None:
        """Submit captions for scoring."""
        if self._scorer is None:
            # METEOR takes more time and memory than the others together.
            metrics = dict.fromkeys((*_METRICS, self._run.config.train.score_metric))
            self._scorer = BackgroundScorer(self._run.val_loader.split.references(), list(metrics))
        self._scorer.submit(captions)

    def _wait(self) -> dict[str, float] | None:
        """Return scores; None if this rank is asked to stop, empty if scoring failed."""
        assert self._scorer is not None
        try:
            while (scores := self._scorer.result(_POLL_S)) is None:
                if preemption.requested():
                    return None
        except UserError as error:
            if not self._run.train_state.best_step:
                raise
            self._bar.say(f"warning: step {self._run.train_state.validated_step:,} has no scores: {error}")
            return {}
        self.log_scores()
        return scores
