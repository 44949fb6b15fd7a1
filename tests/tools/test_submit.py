import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from captionscale import toml
from captionscale.errors import UserError
from captionscale.tools.submit import submit

ROOT = Path(__file__).parents[2]

# tests/slurm submits and runs such jobs.


def written(capsys: pytest.CaptureFixture[str], run: str = "runs/a run", nodes: int = 2) -> str:
    """Return the job that would be submitted."""
    submit(
        toml.load("attention"), Path(run), nodes=nodes, gpus=8, time="4:00:00", profile="gpu", dry_run=True
    )
    return capsys.readouterr().out


def test_a_job_contains_the_files_that_it_sources(capsys) -> None:
    job = written(capsys)
    assert "\nsource slurm/" not in job
    assert subprocess.run(["bash", "-n"], input=job, text=True, check=False).returncode == 0
    assert "scontrol requeue" in job
    assert "NCCL_SOCKET_IFNAME" in job


# SLURM reads no options after the first command, and uses the last of two.
def test_requested_options_follow_the_scripts_own_and_precede_its_commands(capsys) -> None:
    lines = written(capsys).splitlines()
    commands = [number for number, line in enumerate(lines) if line and not line.startswith("#")]
    options = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert options[-1] < commands[0]
    assert [line for line in lines if "--nodes" in line and line.startswith("#SBATCH")][
        -1
    ] == "#SBATCH --nodes=2"
    assert "#SBATCH --time=4:00:00" in lines
    assert "#SBATCH --gpus-per-node=8" in lines
    assert "#SBATCH '--output=runs/a run/logs/%j.log'" in lines
    assert "set -- 'runs/a run/job.toml' 'runs/a run'" in lines


def test_a_job_of_one_node_may_share_it_and_requests_a_core_for_each_decoding_thread(capsys) -> None:
    several, one = written(capsys), written(capsys, nodes=1)
    assert "--exclusive" in several
    assert "--exclusive" not in one
    assert "#SBATCH --cpus-per-task" not in several
    threads = 8 * toml.load("attention").data.workers
    assert re.findall("--cpus-per-task=(\\d+)$", one, re.MULTILINE)[-1] == str(threads)


@pytest.mark.parametrize(
    ("script", "folder", "end", "printed"),
    [
        ("pack.sbatch", "", "", "holds no slurm/job.sh, expected the checkout; call sbatch from there"),
        ("pack.sbatch", ROOT, "", "SLURM_JOB_ID: not set, expected within a job; start the script by sbatch"),
        ("multi_node.sbatch", ROOT, "0", "1 arguments, expected EXPERIMENT RUN"),
    ],
)
def test_a_wrongly_called_script_prints_its_usage(tmp_path, script, folder, end, printed) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environment |= {"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": end} if end else {}
    done = subprocess.run(
        ["bash", ROOT / "slurm" / script, "attention"],
        cwd=folder or tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert printed in done.stderr


def test_more_processes_than_micro_batches_are_refused(capsys) -> None:
    with pytest.raises(UserError, match=r"^24 processes: train.global_batch = 256 holds 16 micro-batches"):
        written(capsys, nodes=3)


def test_without_slurm_it_is_refused_before_anything_is_written(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    settings = toml.load("attention")
    with pytest.raises(
        UserError, match=r"^sbatch: not found, expected a login node .*; log in there, or train here"
    ):
        submit(settings, tmp_path / "run", nodes=1, gpus=1, time=None, profile="gpu", dry_run=False)
    assert not (tmp_path / "run").exists()


def test_an_error_of_sbatch_is_shown(monkeypatch, tmp_path) -> None:
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition' >&2\nexit 1\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", str(sbatch.parent), prepend=":")
    settings = toml.load("attention")
    with pytest.raises(UserError) as caught:
        submit(settings, tmp_path / "run", nodes=1, gpus=1, time=None, profile="gpu", dry_run=False)
    assert "job.sbatch: sbatch refuses it (sbatch: error: invalid partition), expected a job" in str(
        caught.value
    )
    assert toml.load(tmp_path / "run" / "job.toml") == settings
