"""Jobs on a SLURM cluster of two nodes; `cluster.sh` starts and stops it."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from experiment import load_weights, logged_losses, max_abs_difference, tiny_config

from captionscale.data.packing import PackOptions, pack
from captionscale.data.sources import coco
from captionscale.train.loop import train
from captionscale.train.run_folder import checkpoint_steps

pytestmark = pytest.mark.long

CHECKOUT = Path(__file__).parents[2]
CLUSTER = Path(__file__).with_name("cluster.sh")
TOLERANCE = 1e-5
# 18 steps; ranks that wait to be interrupted may wait long.
CHANGES = (
    'model.encoder={name="interrupted_encoder:InterruptedEncoder", weights="none", trainable=["second"]}',
    "train.epochs=6",
    "train.save_every=1",
    "train.score_every=18",
    "train.stall_s=600",
)
DEADLINE_S = 600
PROGRAM = f"""
import sys
sys.path.insert(0, {str(CHECKOUT / "tests")!r})
if __name__ == "__main__":
    if sys.argv[1] == "launch":
        # Its rank is a fork of it, which saves the time of its imports.
        import forked
        forked.prepare()
    from captionscale.cli import main
    main()
"""
"""The command `captionscale`."""

Slurm = Callable[..., str]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A function that runs commands on a cluster."""
    if missing := [name for name in ("slurmctld", "slurmd", "munged") if shutil.which(name) is None]:
        pytest.skip(f"needs {', '.join(missing)}: apt-get install slurm-wlm munge")
    if os.geteuid():
        pytest.skip("needs root, to start SLURM's daemons")
    home = tmp_path_factory.mktemp("cluster")
    program = home / "bin" / "captionscale"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\n{PROGRAM}")
    program.chmod(0o755)
    profile = home / "one.yaml"
    profile.write_text((CHECKOUT / "launch/cpu.yaml").read_text().replace("processes: 2", "processes: 1"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environment |= {
        "SLURM_CONF": str(home / "slurm.conf"),
        # Several jobs at once on nodes that multi_node.sbatch would allocate whole.
        "SBATCH_EXCLUSIVE": "user",
        "CAPTIONSCALE_PROFILE": str(profile),
        "CAPTIONSCALE_LOGS": str(home / "logs"),
        "OMP_NUM_THREADS": "1",
        "PATH": f"{home / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
    }

    def run(*command: str | Path, folder: Path = CHECKOUT, **more: str) -> str:
        done = subprocess.run(
            command, cwd=folder, env=environment | more, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    subprocess.run([CLUSTER, "start", home], check=True)
    yield run
    subprocess.run([CLUSTER, "stop", home], check=True)


@pytest.fixture(scope="module")
def jobs(slurm: Slurm, synthetic_coco: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Four jobs at once: one is preempted, requeued and killed; three pack, train and score in a chain."""
    folder = tmp_path_factory.mktemp("jobs")
    for split in ("train", "val"):
        captions = synthetic_coco / "annotations" / f"captions_{split}2017.json"
        records = coco.read_official(synthetic_coco / f"{split}2017", captions, split)
        pack(records, folder / "shards", sources=[captions], options=PackOptions(images_per_shard=16))
    settings = tiny_config(folder, folder / "shards", *CHANGES)
    facts = SimpleNamespace(
        interrupted=folder / "interrupted", chain=folder / "chain", alone=folder / "alone", folder=folder
    )

    # A site's edits: a container (here a script that prints its command) and a node-local disk.
    shutil.copytree(CHECKOUT / "slurm", folder / "slurm")
    container = folder / "container"
    container.write_text('#!/bin/sh\necho "container: $1 $2"\nexec "$@"\n')
    container.chmod(0o755)
    with (folder / "slurm" / "site.sh").open("a") as site:
        site.write(f"inside=({container})\nexport CAPTIONSCALE_CACHE={folder}/disk\n")
        # The other job runs it, and this one starts four times.
        site.write("export CAPTIONSCALE_DOCTOR=off\n")
    sbatch = ("sbatch", "--parsable", f"--output={folder}/%j.log")
    facts.interrupted_job = slurm(
        *(*sbatch, "slurm/multi_node.sbatch", folder / "experiment.toml", facts.interrupted),
        *("--set", f"data.shards=local://{folder}/shards"),
        folder=folder,
        INTERRUPTIONS="signal signal kill",
    )

    test = synthetic_coco / "annotations" / "captions_test2017.json"
    facts.pack_job = slurm(
        *(*sbatch, "--cpus-per-task=1", "slurm/pack.sbatch", "coco", "--images", synthetic_coco / "test2017"),
        *("--captions", test, "--split", "test", "--out", folder / "shards", "--images-per-shard", "16"),
    )
    facts.sbatch, facts.started = sbatch, Future()
    with ThreadPoolExecutor() as pool:
        both = [pool.submit(_interrupt, slurm, facts), pool.submit(_run_out_of_time, slurm, facts)]
        train(settings, facts.alone)
        for each in both:
            each.result()
    return facts


def _interrupt(slurm: Slurm, facts: SimpleNamespace) -> None:
    job, run = facts.interrupted_job, facts.interrupted
    began = time.monotonic()
    _until(lambda: _trained(run, 1), "the first steps")
    facts.started.set_result(time.monotonic() - began)
    # To the job's script as well, which must keep running.
    slurm("scancel", "--full", "--signal=USR1", job)
    _until(lambda: _restarted(slurm, job, 1), "the restart after USR1")
    first = checkpoint_steps(run)[-1]
    _until(lambda: _trained(run, first + 1), "steps after the restart")
    slurm("scontrol", "requeue", job)
    _until(lambda: _restarted(slurm, job, 2), "the restart after requeue")
    _until(lambda: _restarts(slurm, job) == 3, "the end after SIGKILL")
    _until(lambda: _state(slurm, job) == "COMPLETED", "the end")


def _run_out_of_time(slurm: Slurm, facts: SimpleNamespace) -> None:
    # Three times as long as the other job took to start: this one runs doctor first, next to other jobs.
    limit_s = 30 + round(3 * facts.started.result(DEADLINE_S))
    minutes = limit_s // 60 + 2
    printed = slurm(
        *("captionscale", "submit", facts.folder / "experiment.toml", "--out", facts.chain),
        *("--profile", "cpu", "--time", f"{minutes}", "--set", f"train.grace_s={60 * minutes - limit_s}"),
        SBATCH_SIGNAL="USR1@1",
        INTERRUPTIONS="signal",
    )
    [facts.chain_job] = [job] = re.findall(r"job (\d+)", printed.splitlines()[0])
    facts.score_job = slurm(
        *(*facts.sbatch, "--cpus-per-task=1", f"--dependency=afterok:{facts.pack_job}:{job}"),
        *("slurm/score.sbatch", facts.chain, "--split", "test"),
    )
    _until(lambda: _restarts(slurm, job) > 0, "the end of the time")
    slurm("scontrol", "update", f"JobId={job}", f"TimeLimit={10 * minutes}")
    _until(lambda: _state(slurm, facts.score_job) == "COMPLETED", "the scores")


def _until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline, f"waited too long for {what}"
        time.sleep(0.1)


def _trained(run: Path, least: int) -> bool:
    """Whether a run has a checkpoint of this step or a later one."""
    return bool(steps := checkpoint_steps(run)) and steps[-1] >= least


def _field(slurm: Slurm, job: str, name: str) -> str:
    [value] = re.findall(rf"\b{name}=(\S+)", slurm("scontrol", "show", "job", job))
    return value


def _restarted(slurm: Slurm, job: str, times: int) -> bool:
    """Whether a job runs again, not only ends to do so."""
    return _restarts(slurm, job) == times and _state(slurm, job) == "RUNNING"


def _restarts(slurm: Slurm, job: str) -> int:
    _state(slurm, job)
    return int(_field(slurm, job, "Restarts"))


def _state(slurm: Slurm, job: str) -> str:
    state = _field(slurm, job, "JobState")
    assert state not in ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"), f"job {job}: {state}"
    return state


def _log(facts: SimpleNamespace, job: str) -> str:
    return (facts.folder / f"{job}.log").read_text()


def _assert_same_result(run: Path, alone: Path) -> None:
    assert max_abs_difference(load_weights(run), load_weights(alone)) < TOLERANCE
    assert logged_losses(run) == [
        (step, pytest.approx(loss, abs=TOLERANCE)) for step, loss in logged_losses(alone)
    ]


def test_a_job_with_a_signal_a_requeue_and_a_kill_ends_with_the_weights_of_one_process(
    jobs: SimpleNamespace,
) -> None:
    _assert_same_result(jobs.interrupted, jobs.alone)


def test_a_job_at_its_time_limit_resumes_and_ends_with_the_weights_of_one_process(
    jobs: SimpleNamespace,
) -> None:
    _assert_same_result(jobs.chain, jobs.alone)


def test_a_killed_rank_is_named(jobs: SimpleNamespace) -> None:
    assert "rank 1 on" in _log(jobs, jobs.interrupted_job)
    assert "was killed by SIGKILL" in _log(jobs, jobs.interrupted_job)


def test_preemption_and_kill_are_logged_with_their_exit_code(jobs: SimpleNamespace) -> None:
    printed = re.findall(r"job \d+: (.+?) after (\d) restarts", _log(jobs, jobs.interrupted_job))
    # `scontrol requeue` ends the job's script at once.
    assert printed == [("preempted", "0"), ("killed, with code 137", "2")]
    assert "SIGUSR1: step" in _log(jobs, jobs.interrupted_job)


def test_a_job_runs_in_the_sites_container_and_reads_from_the_local_disk(jobs: SimpleNamespace) -> None:
    assert "container: captionscale launch" in _log(jobs, jobs.interrupted_job)
    assert len(list((jobs.folder / "disk").glob("*.tar"))) == 4


def test_each_rank_has_its_log(jobs: SimpleNamespace) -> None:
    logs = jobs.chain / "logs"
    for restart in (0, 1):
        of_ranks = [path.read_text() for path in (logs / f"{jobs.chain_job}.{restart}").rglob("stderr.log")]
        assert sorted(bool(text) for text in of_ranks) == [False, True], "rank 1 prints nothing"
    assert "[rank 0] training" in (logs / f"{jobs.chain_job}.log").read_text()


def test_scoring_starts_after_packing_and_all_restarts_of_training(jobs: SimpleNamespace) -> None:
    [receipt] = jobs.chain.glob("scores/test-*/receipt.json")
    assert len(json.loads(receipt.read_text())["scores"]) >= 4
