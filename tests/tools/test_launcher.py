import os
import shlex
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch.distributed.elastic.multiprocessing.api import SignalException

from captionscale import toml
from captionscale.config import Config
from captionscale.errors import UserError
from captionscale.tools.launcher import launch

COMMAND = ["train", "quickstart", "--out", "a run", "--set", "train.lr=2e-4"]


@pytest.fixture(autouse=True)
def _outside_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name in ("OMP_NUM_THREADS", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set SLURM's variables; at first those of the third of four nodes."""

    def put(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(f"SLURM_{name}", value)

    put(JOB_ID="7", JOB_NUM_NODES="4", NODEID="2", STEP_NUM_NODES="4", STEP_NUM_TASKS="4")
    put(STEP_NODELIST="gpu[01-02,11-12]")
    return put


@pytest.fixture
def dry_run(capsys: pytest.CaptureFixture[str]):
    """Return the environment of a launch and its arguments, as Accelerate understands them."""

    def run(profile: str | Path = "cpu", processes: int | None = None, **more):
        launch(COMMAND, profile=str(profile), processes=processes, dry_run=True, **more)
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
def test_on_one_node_every_process_runs_the_command(dry_run, processes) -> None:
    _, arguments = dry_run(processes=processes)
    assert (arguments.num_processes, arguments.num_machines) == (processes or 2, 1)
    assert arguments.module
    assert [arguments.training_script, *arguments.training_script_args] == ["captionscale", *COMMAND]
    # Port 0: any free one, so that two runs on one machine do not collide.
    assert arguments.main_process_port == 0


def test_processes_stay_on_the_cpu_if_the_profile_says_so(dry_run) -> None:
    assert dry_run("cpu")[0] == ["ACCELERATE_USE_CPU=true"]
    assert dry_run("gpu")[0] == []


@pytest.mark.parametrize("profile", ["cpu", "gpu", "zero2"])
@pytest.mark.parametrize(("processes", "threads"), [(2, "6"), (5, "2"), (12, "1"), (64, "1")])
def test_processes_share_the_cores(dry_run, monkeypatch, profile, processes, threads) -> None:
    # Two processes with a thread for each core take ten times as long.
    # Regression: those of ZeRO had one thread each, as Accelerate does not pass the number on.
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    environment, options = dry_run(profile, processes)
    for pair in environment:
        monkeypatch.setenv(*pair.split("=", 1))
    options = _validate_launch_command(options)[0]
    options.deepspeed_fields_from_accelerate_config = ""
    zero = profile == "zero2"
    given = prepare_deepspeed_cmd_env(options)[1] if zero else prepare_multi_gpu_env(options)
    assert given["OMP_NUM_THREADS"] == threads


def test_a_profile_is_a_file_or_a_name(dry_run, tmp_path) -> None:
    path = profile(tmp_path, "num_processes: 5\ndistributed_type: MULTI_GPU\n")
    _, arguments = dry_run(path)
    assert arguments.num_processes == 5
    assert arguments.config_file == str(path)


@pytest.mark.usefixtures("slurm")
def test_the_nodes_of_a_slurm_job_connect_to_the_first(dry_run) -> None:
    _, arguments = dry_run("gpu")
    assert (arguments.num_machines, arguments.num_processes, arguments.machine_rank) == (4, 32, 2)
    assert arguments.main_process_ip == "gpu01"
    assert arguments.main_process_port == 29507


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("a,b", "a"),
        ("n[08-10]", "n08"),
        ("r[1-2]n[3,5]-ib,x", "r1n3-ib"),
        ("gpu-1,n[1-2]", "gpu-1"),
    ],
)
def test_the_first_node_is_found_in_any_node_list_of_slurm(dry_run, slurm, nodes, first) -> None:
    slurm(STEP_NODELIST=nodes)
    assert dry_run()[1].main_process_ip == first


# Such as `salloc --nodes=4`, then `srun --nodes=1 captionscale launch`.
def test_a_step_smaller_than_its_job_has_only_its_own_nodes(dry_run, slurm) -> None:
    slurm(STEP_NUM_NODES="2", STEP_NUM_TASKS="2", STEP_NODELIST="gpu[11-12]", NODEID="1")
    _, arguments = dry_run()
    assert (arguments.num_machines, arguments.machine_rank, arguments.main_process_ip) == (2, 1, "gpu11")
    slurm(STEP_NUM_NODES="1", STEP_NUM_TASKS="1", STEP_NODELIST="gpu11", NODEID="0")
    assert (dry_run()[1].num_machines, dry_run()[1].main_process_port) == (1, 0)


def test_the_batch_script_of_one_node_has_no_step(dry_run, slurm, monkeypatch) -> None:
    for name in ("STEP_NUM_NODES", "STEP_NUM_TASKS", "STEP_NODELIST"):
        monkeypatch.delenv(f"SLURM_{name}")
    slurm(JOB_NUM_NODES="1", NODEID="0")
    assert dry_run()[1].num_machines == 1
    slurm(JOB_NUM_NODES="2")
    with pytest.raises(UserError) as caught:
        dry_run()
    assert str(caught.value) == (
        "SLURM: 1 launcher on 2 nodes, expected one on each; start it with srun --ntasks-per-node=1"
    )


@pytest.mark.parametrize("name", ["JOB_ID", "NODEID", "STEP_NODELIST"])
def test_a_variable_that_a_container_hides_is_named(dry_run, slurm, monkeypatch, name) -> None:
    slurm()
    monkeypatch.delenv(f"SLURM_{name}")
    with pytest.raises(UserError) as caught:
        dry_run()
    assert str(caught.value) == (
        f"SLURM_{name}: not set, expected as srun sets it on 4 nodes; start it with srun --ntasks-per-node=1,"
        " and pass its environment into a container"
    )


def test_a_launcher_for_each_gpu_is_refused(dry_run, slurm) -> None:
    slurm(STEP_NUM_TASKS="32")
    with pytest.raises(UserError, match=r"^SLURM: 32 launchers on 4 nodes, expected one on each"):
        dry_run()


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "OMPI_COMM_WORLD_RANK"])
def test_another_launcher_is_refused(dry_run, monkeypatch, name) -> None:
    monkeypatch.setenv(name, "3")
    with pytest.raises(UserError) as caught:
        dry_run()
    assert str(caught.value) == (
        f"{name} = 3: another launcher has started this process, expected captionscale to be the only one;"
        " leave out `captionscale launch --`, or that launcher"
    )


@pytest.mark.usefixtures("slurm")
def test_processes_are_counted_over_all_nodes(dry_run) -> None:
    assert dry_run("gpu", 8)[1].num_processes == 8
    with pytest.raises(UserError) as caught:
        dry_run("gpu", 6)
    assert str(caught.value) == (
        "--processes 6: 4 nodes cannot share them evenly, expected a multiple of 4; change --processes"
    )


def experiment(*changes: str) -> Config:
    """Return an experiment with 16 micro-batches in a step."""
    return toml.load("attention", ["train.global_batch=256", "train.micro_batch=16", *changes])


@pytest.mark.parametrize(
    ("profile", "processes", "ending"),
    [
        ("gpu", 17, "expected at least one for each process; take 16 processes, or lower train.micro_batch"),
        (
            "zero2",
            3,
            "expected a multiple of the processes under ZeRO; take 2 processes, or take --profile gpu",
        ),
        (
            "zero2",
            32,
            "expected a multiple of the processes under ZeRO; take 16 processes, or lower train.micro_batch",
        ),
    ],
)
def test_processes_that_cannot_share_a_step_are_refused(dry_run, profile, processes, ending) -> None:
    with pytest.raises(UserError) as caught:
        dry_run(profile, processes, config=experiment())
    assert str(caught.value) == (
        f"{processes} processes: train.global_batch = 256 holds 16 micro-batches of train.micro_batch = 16,"
        f" {ending}"
    )


@pytest.mark.parametrize(("profile", "processes"), [("gpu", 16), ("gpu", 3), ("zero2", 8)])
def test_processes_that_can_share_a_step_are_accepted(dry_run, profile, processes) -> None:
    assert dry_run(profile, processes, config=experiment())[1].num_processes == processes


@pytest.mark.usefixtures("slurm")
def test_the_cure_is_a_multiple_of_the_nodes(dry_run) -> None:
    with pytest.raises(UserError, match="; take 16 processes, or lower"):
        dry_run("gpu", config=experiment())
    with pytest.raises(
        UserError, match=r"holds 3 micro-batches .* for each process; lower train.micro_batch$"
    ):
        dry_run("gpu", 4, config=experiment("train.global_batch=48"))


def test_more_decoding_threads_than_cores_are_noted(monkeypatch, capsys) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    for workers in (2, 4):
        launch(
            COMMAND, profile="gpu", processes=8, dry_run=True, config=experiment(f"data.workers={workers}")
        )
    assert capsys.readouterr().err == (
        "note: 8 processes with data.workers = 4 on 16 cores; ask SLURM for --cpus-per-task=32,"
        " or lower data.workers\n"
    )


def test_more_decoding_threads_in_one_process_than_cores_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    with pytest.raises(UserError, match=r"data\.workers = 3: found 2 cores .*--set data\.workers=1"):
        launch(COMMAND, profile="cpu", processes=2, dry_run=False, config=experiment("data.workers=3"))


def test_the_users_number_of_threads_is_kept(dry_run, monkeypatch) -> None:
    for chosen, threads in (("3", 3), ("2,1", 1)):
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
        assert dry_run(processes=64)[1].num_cpu_threads_per_process == threads


def test_output_goes_to_log_files_and_to_the_terminal(dry_run, tmp_path) -> None:
    environment, arguments = dry_run(logs=tmp_path)
    assert (arguments.log_dir, arguments.tee) == (str(tmp_path / os.uname().nodename), "3")
    assert "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE=[rank ${rank}] " in environment


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
def test_a_file_that_is_no_profile_is_refused(dry_run, tmp_path, text) -> None:
    path = profile(tmp_path, text)
    with pytest.raises(UserError) as caught:
        dry_run(path)
    assert str(caught.value).startswith(f"{path}: not a profile (")
    assert str(caught.value).endswith(
        ", expected an Accelerate config with num_processes; see launch/cpu.yaml"
    )


@pytest.mark.parametrize(
    ("kind", "found"),
    [("", "None"), ("distributed_type: FSDP\n", "FSDP"), ("distributed_type: NO\n", "False")],
)
def test_a_profile_for_an_unsupported_engine_is_refused(dry_run, tmp_path, kind, found) -> None:
    path = profile(tmp_path, f"num_processes: 2\n{kind}")
    with pytest.raises(UserError) as caught:
        dry_run(path)
    assert str(caught.value) == (
        f"{path}: distributed_type is {found}, expected MULTI_GPU, on CPUs too, or DEEPSPEED; set it"
        " as in launch/cpu.yaml or launch/zero2.yaml"
    )


@pytest.mark.parametrize("line", ["num_processors: 2", "compute_environment: AMAZON_SAGEMAKER"])
def test_an_error_of_accelerate_in_a_profile_is_one_line(monkeypatch, tmp_path, line) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    path = profile(tmp_path, f"num_processes: 2\ndistributed_type: MULTI_GPU\n{line}\n")
    with pytest.raises(UserError) as caught:
        launch(COMMAND, profile=str(path), processes=2, dry_run=False)
    assert str(caught.value).startswith(f"{path}: Accelerate refuses it (")


def test_an_unknown_profile_is_refused_with_the_nearest_known_one(dry_run) -> None:
    with pytest.raises(UserError) as caught:
        dry_run("gpus")
    assert str(caught.value) == "gpus: no such file, and no such name in launch/; did you mean 'gpu'?"


def test_a_signal_stops_the_processes_in_one_line(monkeypatch, capsys) -> None:
    def interrupted(_: object) -> None:
        raise SignalException("Process 7 got signal: 2", sigval=signal.SIGINT)

    monkeypatch.setattr("accelerate.commands.launch.launch_command", interrupted)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    with pytest.raises(SystemExit) as caught:
        launch(COMMAND, profile="cpu", processes=2, dry_run=False)
    assert caught.value.code == 128 + signal.SIGINT
    assert capsys.readouterr().err.count("\n") == 1
