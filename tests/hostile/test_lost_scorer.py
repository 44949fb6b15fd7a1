"""The process that scores validation is killed, as the system does where memory is short."""

import json
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
from experiment import logged_losses, tiny_config

from captionscale.errors import UserError
from captionscale.score.worker import BackgroundScorer
from captionscale.train.loop import train

REFERENCES = {7: ["a dog runs", "a brown dog"], 3: ["two cats sleep on a sofa"]}
CAPTIONS = {3: "a cat", 7: "a dog"}


def kill(name: str) -> bool:
    """Kill this process's descendants whose command has this word; return whether there was one."""
    killed = False
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE and any(name in word for word in process.cmdline()):
                process.kill()
                killed = True
        except psutil.NoSuchProcess:
            continue
    return killed


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def scores(run: Path) -> list[tuple[int, dict[str, float]]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(line["step"], line["scores"]) for line in lines if "scores" in line]


def test_a_killed_scorer_or_a_killed_jvm_changes_no_score_and_no_best_checkpoint(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tiny_config(tmp_path, packed, "train.epochs=3")
    alone = train(settings, tmp_path / "alone")
    killed: list[str] = []
    real = BackgroundScorer.submit

    def submit(scorer: BackgroundScorer, captions: Mapping[int, str]) -> None:
        real(scorer, captions)
        word = ("captionscale.score.worker", "PTBTokenizer", "captionscale.score.worker")[len(killed)]
        wait_for(lambda: kill(word))
        killed.append(word)

    monkeypatch.setattr(BackgroundScorer, "submit", submit)
    capsys.readouterr()
    assert train(settings, tmp_path / "killed") == alone
    assert len(killed) == 3
    assert scores(tmp_path / "killed") == scores(tmp_path / "alone")
    assert logged_losses(tmp_path / "killed") == logged_losses(tmp_path / "alone")
    said = capsys.readouterr().err
    assert said.count("; scoring the same captions again") == 3
    assert "has no scores" not in said


def test_one_that_is_killed_each_time_is_an_error_after_three_and_the_next_one_scores() -> None:
    with closing(BackgroundScorer(REFERENCES, ("BLEU-1", "ROUGE-L"))) as scorer:
        scorer.submit(CAPTIONS)

        def scored_before_it_is_killed() -> dict[str, float] | None:
            kill("captionscale.score.worker")
            return scorer.result()

        with pytest.raises(UserError, match="its process ended with exit code -9"):
            wait_for(scored_before_it_is_killed)
        scorer.submit(CAPTIONS)
        found: list[Any] = []
        wait_for(lambda: found.append(scorer.result()) or found[-1])
        assert found[-1]["BLEU-1"] > 0


def test_closing_while_a_killed_one_is_replaced_leaves_no_process() -> None:
    scorer = BackgroundScorer(REFERENCES, ("BLEU-1",))
    scorer.submit(CAPTIONS)
    wait_for(lambda: kill("captionscale.score.worker"))
    scorer.close()
    assert not kill("captionscale.score.worker")
