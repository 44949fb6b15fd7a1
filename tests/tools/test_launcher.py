import os
import shlex
import signal
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.elastic.multiprocessing.api import SignalException

from captionscale.errors import UserError
from captionscale.tools.launcher import launch

VERB = ["train", "quickstart", "--out", "a run", "--set", "train.lr=2e-4"]


@pytest.fixture(autouse=True)
def _outside_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The third of four machines of a SLURM job, whose `scontrol` can name them."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text('#!/bin/sh\ntest "$*" = "show hostnames gpu[01-04]" && printf "gpu0%d\\n" 1 2 3 4\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    for name, value in (("NNODES", "4"), ("NODEID", "2"), ("JOB_NODELIST", "gpu[01-04]"), ("JOB_ID", "7")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    return scontrol


@pytest.fixture
def dry_run(capsys: pytest.CaptureFixture[str]):
    """Return the environment of a launch and its arguments, as Accelerate understands them."""

    def run(profile: str | Path = "cpu", processes: int | None = None):
        launch(VERB, profile=str(profile), processes=processes, dry_run=True)
        words = shlex.split(capsys.readouterr().out)
        start = words.index("accelerate")
        assert words[start : start + 2] == ["accelerate", "launch"]
        return words[:start], launch_command_parser().parse_args(words[start + 2 :])

    return run


def profile(folder: Path, text: str) -> Path:
    path = folder / "my profile.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("processes", [None, 1, 3])
def test_on_one_machine_every_process_runs_the_verb(dry_run, processes) -> None:
    _, arguments = dry_run(processes=processes)
    assert (arguments.num_processes, arguments.num_machines) == (processes or 2, 1)
    assert arguments.module
    assert [arguments.training_script, *arguments.training_script_args] == ["captionscale", *VERB]
    # Port 0: any free one, so that two runs on one machine do not meet.
    assert arguments.main_process_port == 0


def test_processes_stay_on_the_cpu_if_the_profile_says_so(dry_run) -> None:
    assert dry_run("cpu")[0] == ["ACCELERATE_USE_CPU=true"]
    assert dry_run("gpu")[0] == []


def test_processes_share_the_cores(dry_run, monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    assert [dry_run(processes=count)[1].num_cpu_threads_per_process for count in (1, 4, 5, 24)] == [
        12,
        3,
        2,
        1,
    ]


def test_a_profile_is_a_file_or_a_name(dry_run, tmp_path) -> None:
    path = profile(tmp_path, "num_processes: 5\n")
    _, arguments = dry_run(path)
    assert arguments.num_processes == 5
    assert arguments.config_file == str(path)


@pytest.mark.usefixtures("slurm")
def test_in_a_slurm_job_the_machines_meet_at_the_first(dry_run) -> None:
    _, arguments = dry_run("gpu")
    assert (arguments.num_machines, arguments.num_processes, arguments.machine_rank) == (4, 32, 2)
    assert arguments.main_process_ip == "gpu01"
    assert arguments.main_process_port == 29507


def test_in_a_slurm_job_of_one_machine_nothing_is_asked_of_slurm(dry_run, slurm, monkeypatch) -> None:
    slurm.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    monkeypatch.setenv("SLURM_NNODES", "1")
    assert dry_run()[1].num_machines == 1


@pytest.mark.usefixtures("slurm")
def test_processes_are_counted_over_all_machines(dry_run) -> None:
    assert dry_run("gpu", 8)[1].num_processes == 8
    with pytest.raises(UserError) as caught:
        dry_run("gpu", 6)
    assert str(caught.value) == (
        "--processes 6: 4 machines cannot share them evenly; wanted a multiple of 4; change --processes"
    )


@pytest.mark.usefixtures("slurm")
@pytest.mark.parametrize("missing", ["SLURM_NODEID", "SLURM_JOB_NODELIST", "scontrol", "nodes"])
def test_a_slurm_job_that_cannot_be_understood_is_refused(dry_run, monkeypatch, missing) -> None:
    if missing == "scontrol":
        monkeypatch.setenv("PATH", "")
    elif missing == "nodes":
        monkeypatch.setenv("SLURM_JOB_NODELIST", "elsewhere")
    else:
        monkeypatch.delenv(missing)
    with pytest.raises(
        UserError, match=r"^SLURM_NNODES = 4, .*; wanted .*; start it by srun --ntasks-per-node=1$"
    ):
        dry_run()


@pytest.mark.parametrize(
    "text",
    [
        "num_processes: many",
        "num_processes: 0",
        "num_processes: -2",
        "use_cpu: true",
        "- 1",
        "only words",
        "",
        "a: [",
        "num_processes:",
    ],
)
def test_what_is_no_profile_is_refused(dry_run, tmp_path, text) -> None:
    path = profile(tmp_path, text)
    with pytest.raises(UserError) as caught:
        dry_run(path)
    assert str(caught.value).startswith(f"{path}: not a profile (")
    assert str(caught.value).endswith(
        "; wanted an Accelerate config with num_processes, such as launch/cpu.yaml"
    )


def test_an_unknown_profile_is_told_with_the_nearest_known_one(dry_run) -> None:
    with pytest.raises(UserError) as caught:
        dry_run("gpus")
    assert str(caught.value) == "gpus: no such file, and no such name in launch/; did you mean 'gpu'?"


def test_a_signal_stops_the_processes_in_one_line(monkeypatch, capsys) -> None:
    def interrupted(_: object) -> None:
        raise SignalException("Process 7 got signal: 2", sigval=signal.SIGINT)

    monkeypatch.setattr("accelerate.commands.launch.launch_command", interrupted)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    with pytest.raises(SystemExit) as caught:
        launch(VERB, profile="cpu", processes=2, dry_run=False)
    assert caught.value.code == 128 + signal.SIGINT
    assert capsys.readouterr().err.count("\n") == 1
