import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from captionscale import toml
from captionscale.cli import main
from captionscale.errors import UserError
from captionscale.tools.watch import RunWatcher, watch
from captionscale.train.log_reader import JsonLinesReader, parse_line
from captionscale.train.log_writer import LogWriter

STEPS_PER_EPOCH = 50


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 100 steps, training on another machine, ten steps into its second epoch."""
    folder = tmp_path / "run"
    folder.mkdir()
    settings = toml.load("quickstart", ["train.epochs=2", "train.global_batch=32", "train.log_every=10"])
    (folder / "config.toml").write_text(toml.dumps(settings), encoding="utf-8")
    (folder / ".lock").write_text("captionscale train, process 7 on another-machine")
    (folder / "checkpoints" / "step-00000050").mkdir(parents=True)
    log = LogWriter(folder, 0, 0)
    for step in range(10, 70, 10):
        log.write(step, epoch=step / STEPS_PER_EPOCH, loss=4 - step / 20, images_per_s=64.0)
        if step == 50:
            log.write(50, scores={"CIDEr-D": 0.75, "BLEU-4": 0.25})
    log.close()
    return folder


def age(run: Path, seconds: float) -> None:
    """Set the age of the log."""
    then = time.time() - seconds
    os.utime(run / "log.jsonl", (then, then))


def show(run: Path, capsys: pytest.CaptureFixture[str]) -> str:
    watch(run, once=True, as_json=False, every_s=1.0)
    return capsys.readouterr().out


def test_a_training_run_shows_its_progress_and_when_it_ends(run, capsys) -> None:
    status = RunWatcher(run).status()
    assert status.state == "alive"
    assert status.facts == {
        "step": "60 of 100",
        "epoch": "1.20 of 2",
        "loss": "1.000",
        "images/s": "64",
        # 40 steps of 32 images at 64 images/s.
        "left": "about 20 s",
        "scores": "CIDEr-D 0.7500, BLEU-4 0.2500 (step 50)",
        "best": "CIDEr-D 0.7500 (step 50)",
        "checkpoints": "50",
    }
    output = show(run, capsys)
    assert "alive" in output
    assert all(value in output for value in status.facts.values())


def test_json_has_the_values_of_the_table_as_numbers(run, capsys) -> None:
    main(["watch", str(run), "--json"])
    tree = json.loads(capsys.readouterr().out)
    assert tree.pop("reason").startswith("last log line")
    assert tree == {
        "run": str(run),
        "state": "alive",
        "step": 60,
        "total_steps": 100,
        "epoch": 1.2,
        "total_epochs": 2,
        "loss": 1.0,
        "reward": None,
        "images_per_s": 64.0,
        "left_s": 20.0,
        "scores": {"step": 50, "scores": {"CIDEr-D": 0.75, "BLEU-4": 0.25}},
        "best": {"step": 50, "scores": {"CIDEr-D": 0.75}},
        "checkpoints": [50],
        "damaged_lines": {},
    }


def test_the_best_of_two_equal_scores_is_the_first(run) -> None:
    with (run / "log.jsonl").open("a") as log:
        for step, score in ((60, 0.75), (70, 0.5)):
            log.write(json.dumps({"step": step, "scores": {"CIDEr-D": score}}) + "\n")
    facts = RunWatcher(run).status().facts
    assert facts["best"] == "CIDEr-D 0.7500 (step 50)"
    assert facts["scores"] == "CIDEr-D 0.5000 (step 70)"


def test_a_run_whose_log_is_late_is_silent(run) -> None:
    # A line every 5 s; validation can take longer.
    age(run, 50)
    assert RunWatcher(run).status().state == "alive"
    age(run, 400)
    status = RunWatcher(run).status()
    assert status.state == "silent"
    assert "last log line 7 min ago, usually every 5.0 s" in status.reason


def test_a_stall_names_the_rank_until_the_run_moves_again(run) -> None:
    stall = {"time": time.time(), "stalled": [{"rank": 3, "host": "node9"}], "waiting": [0, 1]}
    (run / "stalls.jsonl").write_text(json.dumps(stall) + "\n")
    age(run, 60)
    status = RunWatcher(run).status()
    assert (status.state, "rank 3 on node9" in status.reason) == ("stalled", True)
    stall["time"] = time.time() - 100
    (run / "stalls.jsonl").write_text(json.dumps(stall) + "\n")
    age(run, 1)
    assert RunWatcher(run).status().state == "alive"


def test_a_preempted_run_reports_why_and_how_to_resume(run) -> None:
    (run / ".lock").write_text("")
    with (run / "log.jsonl").open("a") as log:
        log.write('{"step": 60, "stop_reason": "SIGUSR1", "stop_save_s": 0.5}\n')
    status = RunWatcher(run).status()
    assert (status.state, status.reason) == ("not running", "stopped by SIGUSR1; the same command resumes it")


def test_a_process_of_this_machine_that_died_is_named(run) -> None:
    with Path("/proc/sys/kernel/pid_max").open() as file:
        nobody = int(file.read())
    (run / ".lock").write_text(f"captionscale train, process {nobody} on {os.uname().nodename}")
    assert "died without a message" in RunWatcher(run).status().reason
    (run / ".lock").write_text(f"captionscale train, process {os.getpid()} on {os.uname().nodename}")
    assert RunWatcher(run).status().state == "alive"


def test_a_finished_run_ends_the_watch(run, capsys) -> None:
    (run / ".lock").write_text("")
    with (run / "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": 100, "epoch": 2.0, "loss": 0.5, "images_per_s": 64.0}) + "\n")
    watch(run, once=False, as_json=False, every_s=60.0)
    [line] = capsys.readouterr().out.splitlines()
    assert "step 100 of 100" in line
    assert "ended: all 100 steps are done" in line


def test_a_resumed_run_drops_the_steps_that_it_repeats(run) -> None:
    watcher = RunWatcher(run)
    assert watcher.status().facts["step"] == "60 of 100"
    LogWriter(run, 50, 50).close()
    assert watcher.status().facts["step"] == "50 of 100"
    with (run / "log.jsonl").open("a") as log:
        log.write('{"step": 60, "epoch": 1.2, "loss": 0.5, "images_per_s": 64.0}\n{"step": 70, "ep')
    assert watcher.status().facts["step"] == "60 of 100"


def test_only_what_is_new_is_read(tmp_path) -> None:
    path = tmp_path / "log.jsonl"
    reader = JsonLinesReader(path, parse_line)
    reader.read()
    assert reader.lines == []
    path.write_text('{"step": 1}\nrubbish\n[3]\n{"step": "x"}\n{"st')
    reader.read()
    assert reader.lines == [{"step": 1}]
    with path.open("a") as file:
        file.write('ep": 2}\n')
    reader.read()
    assert reader.lines == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 9}\n')
    reader.read()
    assert reader.lines == [{"step": 9}]


def test_watch_imports_no_torch(run) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "captionscale", "watch", str(run), "--once"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "60 of 100" in done.stdout
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "captionscale" in imported
    assert imported.isdisjoint({"torch", "torchvision", "tensorboard", "safetensors", "matplotlib"})


def test_ctrl_c_ends_it_quietly(run, monkeypatch, capsys) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupt)
    watch(run, once=False, as_json=False, every_s=1.0)
    assert "step 60 of 100" in capsys.readouterr().out


def test_a_run_that_has_only_been_submitted_has_not_started(tmp_path) -> None:
    (tmp_path / "job.sbatch").write_text("")
    status = RunWatcher(tmp_path).status()
    assert (status.state, status.reason) == ("not running", "it has not started; see squeue for its job")


def test_a_log_and_a_lock_of_another_version_only_leave_facts_out(run) -> None:
    (run / ".lock").write_text("somebody")
    with (run / "log.jsonl").open("a") as log:
        log.write('{"step": 70, "loss": 0.5}\n')
    status = RunWatcher(run).status()
    assert status.state == "alive"
    assert status.facts["step"] == "70"


def test_a_config_of_another_version_only_leaves_facts_out(run) -> None:
    (run / "config.toml").write_text("[data]\nshards = 'x'\nnew_key = 1\n")
    facts = RunWatcher(run).status().facts
    assert facts["step"] == "60"
    assert "left" not in facts


def test_what_is_no_run_is_refused(tmp_path, run) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name, output in (("gone", "no such folder"), ("file", "is a file"), ("empty", "so no run")):
        with pytest.raises(UserError, match=output):
            RunWatcher(tmp_path / name)
    watcher = RunWatcher(run)
    run.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is gone"):
        watcher.status()
