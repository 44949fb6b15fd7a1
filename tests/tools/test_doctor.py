import argparse
import json
import math
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from experiment import TINY_OVERRIDES, spawn_ranks, tiny_config

from captionscale import toml
from captionscale.commands.parser import parser
from captionscale.config import Config
from captionscale.data.shards import Split
from captionscale.errors import UserError
from captionscale.model.encoders.encoder import Encoder
from captionscale.score.metrics import METRICS, measure
from captionscale.tools.doctor import machine, network, storage, throughput
from captionscale.tools.doctor.doctor import doctor
from captionscale.tools.doctor.network import _rounds, report_links
from captionscale.tools.doctor.plan import Plan
from captionscale.tools.doctor.report import Check, CheckResult, ok, run_check, verdict
from captionscale.train.checkpoint_writer import CheckpointWriter
from captionscale.train.fingerprint import make_fingerprint
from captionscale.train.state import TrainState
from captionscale.vocab import SPECIAL_TOKENS, Vocabulary

HOST = os.uname().nodename
STATES = ("ok", "warning", "failure")


def run_doctor(
    packed: Path,
    capsys: pytest.CaptureFixture[str],
    *changes: str,
    out: Path | None = None,
    time_limit: str | None = None,
    gpus: int | None = None,
    profile: str | None = None,
    quick: bool = True,
) -> tuple[bool, dict[str, list[CheckResult]]]:
    """Return whether no check failed, and the results by check."""

    def load() -> Config:
        path = packed.parent / "doctor.toml"
        path.write_text(f'[data]\nshards = "{packed}"\n', encoding="utf-8")
        return toml.load(path, [*TINY_OVERRIDES, *changes])

    passed = doctor(
        load,
        out=out,
        nodes=None,
        gpus=gpus,
        time_limit=time_limit,
        profile=profile,
        quick=quick,
        as_json=True,
    )
    printed = json.loads(capsys.readouterr().out)
    lines: dict[str, list[CheckResult]] = {}
    for line in printed["results"]:
        lines.setdefault(line["check"], []).append(CheckResult(**line))
    assert printed["verdict"] == verdict([line for each in lines.values() for line in each])
    assert passed == (printed["verdict"] != "failure")
    return passed, lines


def failures(lines: dict[str, list[CheckResult]]) -> dict[str, str]:
    """Return the failures by check."""
    return {
        name: f"{line.found}; {line.cure}"
        for name, each in lines.items()
        for line in each
        if line.state == "failure"
    }


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    """Shards that a test may damage."""
    return Path(shutil.copytree(packed, tmp_path / "shards"))


def test_a_check_that_fails_or_hangs_hides_no_other() -> None:
    over = threading.Event()

    def fail(_: object) -> Iterator[CheckResult]:
        yield ok("so far")
        raise RuntimeError("broken")

    def hang(_: object) -> Iterator[CheckResult]:
        yield ok("so far")
        over.wait(600)
        yield ok("too late")

    def refuse(_: object) -> Iterator[CheckResult]:
        raise UserError("place: found, expected; cure")
        yield

    checks = [
        Check("a", fail, 600),
        Check("b", hang, 1),
        Check("c", refuse, 600),
        Check("d", lambda _: [ok("d")], 600),
    ]
    lines = [line for check in checks for line in run_check(check, None, HOST)]
    over.set()
    assert [(line.check, line.state, line.measured) for line in lines] == [
        ("a", "ok", True),
        ("a", "warning", False),
        ("b", "ok", True),
        ("b", "warning", False),
        ("c", "failure", True),
        ("d", "ok", True),
    ]
    assert "RuntimeError: broken" in lines[1].found
    assert "no answer within 1 s" in lines[3].found
    assert (lines[4].found, lines[4].cure) == ("place: found, expected", "cure")


def test_the_expected_scores_are_those_of_pycocoevalcap() -> None:
    texts, grams = (machine.CAPTIONS, machine.REFERENCES), [name for name in METRICS if name != "METEOR"]
    reference = measure(*texts, grams, reference_implementation=True).values
    # The same jar in both cases; tests/score/test_meteor.py tests the smaller table.
    reference |= measure(*texts, ["METEOR"], workers=1).values
    assert reference == pytest.approx(dict(machine.EXPECTED), abs=1e-8)
    assert set(machine.EXPECTED) == set(METRICS)
    # No score is right by chance, such as 0 or 1.
    assert all(0.01 < value < 9.9 for value in reference.values())


def test_an_evaluator_with_wrong_scores_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(machine, "EXPECTED", {"BLEU-4": machine.EXPECTED["BLEU-4"] + 1e-4})
    with pytest.raises(UserError, match=r"BLEU-4 0\.756241 instead of 0\.756341"):
        list(machine.evaluator(None))


def test_a_job_that_will_work_passes(packed, tmp_path, capsys) -> None:
    passed, lines = run_doctor(packed, capsys, out=tmp_path / "run")
    assert passed
    assert {"versions", "gpus", "java", "workers", "shards", "batches", "weights", "disk", "finish"} == set(
        lines
    )
    assert any("train 48 images with 240 captions" in line.found for line in lines["shards"])
    assert any("3 steps in an epoch, 6 in the run" in line.found for line in lines["batches"])
    assert all(line.host == HOST and line.state in STATES for each in lines.values() for line in each)
    assert not (tmp_path / "run").exists(), "nothing is written"


@pytest.mark.parametrize(
    ("damage", "printed"),
    [
        (lambda it: (it / "train-00001.tar").unlink(), "missing, manifest says"),
        (lambda it: os.truncate(it / "train-00002.tar", 1000), "1,000 bytes, manifest says"),
        (lambda it: (it / "manifest.json").unlink(), "no manifest.json, so no finished shards"),
        (shutil.rmtree, "no manifest.json, so no finished shards"),
        (lambda it: (it / "train.index.npy").write_bytes(b"rot"), "sha256 differs"),
    ],
    ids=["shard gone", "shard truncated", "manifest gone", "folder gone", "index damaged"],
)
def test_incomplete_shards_are_refused(
    copy: Path, capsys, damage: Callable[[Path], object], printed: str
) -> None:
    damage(copy)
    passed, lines = run_doctor(copy, capsys)
    assert not passed
    assert printed in failures(lines)["shards"]
    assert [line.state for line in lines["java"]] == ["ok"], "the other checks still run"


def test_a_damaged_sample_is_found(copy: Path, capsys) -> None:
    # All samples of the validation split are checked, as there are few.
    path = copy / "val-00000.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    passed, lines = run_doctor(copy, capsys)
    assert not passed
    assert "captionscale verify" in failures(lines)["shards"]


@pytest.mark.parametrize(
    ("changes", "options", "check", "printed"),
    [
        (["train.lr=-1"], {}, "config", "train.lr"),
        (["data.train_split=trian"], {}, "shards", "did you mean 'train'?"),
        (["data.val_split=train"], {}, "shards", "scores would be of training images"),
        (["train.global_batch=47", "train.micro_batch=1"], {}, "batches", "cannot give each of"),
        (["data.workers=1000"], {}, "workers", "expected one for each decoding thread"),
        (["model.encoder.weights=gone.pth"], {}, "weights", "no such file"),
        (["train.init_from=gone"], {}, "weights", "gone: no such folder, expected the --out"),
        (["train.grace_s=0.0001"], {}, "disk", "a job at its time limit would lose its work"),
        ([], {"time_limit": "1"}, "finish", "it would do nothing"),
        ([], {"time_limit": "soon"}, "config", "--time soon: not a time"),
        ([], {"profile": "zero9"}, "config", "zero9"),
        ([], {"gpus": 5, "profile": "gpu"}, "batches", "expected at least one for each process"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_a_job_that_would_fail_is_refused_with_a_cure(
    packed, capsys, changes, options, check, printed
) -> None:
    passed, lines = run_doctor(packed, capsys, *changes, **options)
    assert not passed
    assert printed in failures(lines)[check]
    assert lines["java"][0].state == "ok"


def test_the_slow_checks_measure_loading_and_the_step(packed, capsys, monkeypatch) -> None:
    monkeypatch.setattr(throughput, "_LOAD_S", 0.1)
    passed, lines = run_doctor(packed, capsys, quick=False)
    assert passed
    assert re.search(
        r"loads [\d,]+ images/s .* a step takes [\d,.]+ images/s \(\d steps", lines["loading"][0].found
    )
    assert re.search(r"images/s \(at best, by \d steps .*\): .* an epoch", lines["finish"][0].found)
    assert all(line.measured for name in ("loading", "finish", "evaluator") for line in lines[name])


def test_a_step_on_cached_features_is_timed_without_the_encoder(packed, tmp_path, monkeypatch) -> None:
    # Regression: the estimate "at best" was many times too long.
    calls, encode = [], Encoder.forward

    def count(*arguments):
        calls.append(1)
        return encode(*arguments)

    monkeypatch.setattr(Encoder, "forward", count)
    plain = ("data.crop_scale=[1.0, 1.0]", "data.flip=false", "data.color_jitter=0")
    frozen = ("model.encoder.trainable=none", *plain)
    settings = tiny_config(tmp_path, packed, *frozen, "train.cache_features=true")
    rate, how = throughput._training_rate(
        Plan(settings, None, {"use_cpu": True}, 1, 1, math.inf, True, False)
    )
    assert rate > 0
    assert "features on cpu" in how
    assert len(calls) == 1


def test_a_folder_that_cannot_be_written_is_refused(packed, tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("in the way")
    passed, lines = run_doctor(packed, capsys, out=tmp_path / "file" / "run")
    assert not passed
    assert "cannot be written" in failures(lines)["disk"]


def test_a_resume_that_train_would_refuse_is_refused_by_the_keys_that_differ(packed, tmp_path) -> None:
    settings = tiny_config(tmp_path, packed)
    run, small = tmp_path / "run", {"a": torch.rand(3)}
    words = Vocabulary((*SPECIAL_TOKENS, "dog"))
    fingerprint = make_fingerprint(settings, shards=Split(packed, "train").sha256, vocabulary=words.sha256)
    CheckpointWriter(run, settings, words, fingerprint).write(TrainState(step=1), small, small)

    def check_run(*changes: str) -> CheckResult:
        changed = toml.load(tmp_path / "experiment.toml", changes)
        (line,) = storage.run(Plan(changed, run, {}, 1, 1, math.inf, True, False))
        return line

    line = check_run("data.image_size=99", "train.score_metric=BLEU-4")
    assert line.state == "failure"
    assert line.found.endswith(
        "is of another experiment: data.image_size was 32, now 99;"
        " train.score_metric was 'CIDEr-D', now 'BLEU-4'"
    )
    assert check_run("model.encoder.weights=imagenet", "train.lr=1e-9").state == "ok"


def test_a_run_longer_than_its_job_needs_several_jobs(packed, tmp_path, capsys) -> None:
    run = tmp_path / "run"
    run.mkdir()
    line = {"step": 1, "loss": 1.0, "images_per_s": 0.1}
    (run / "log.jsonl").write_text(json.dumps(line) + "\n")
    passed, lines = run_doctor(packed, capsys, "train.grace_s=30", out=run, time_limit="5")
    assert passed
    # 96 images at 0.1 images/s take 960 s, of which a job has 270.
    assert "it takes about 4 such jobs" in lines["finish"][0].found


# As nvidia-smi prints it: tab-separated, and with an underlined header on newer drivers.
TOPOLOGY = """\x1b[4mGPU0	GPU1	GPU2	GPU3	NIC0	CPU Affinity	NUMA Affinity	GPU NUMA ID\x1b[0m
GPU0	 X 	NV12	{link}	{link}	PXB	0-31	0		N/A
GPU1	NV12	 X 	{link}	{link}	SYS	0-31	0		N/A
GPU2	{link}	{link}	 X 	NV12	SYS	32-63	1		N/A
GPU3	{link}	{link}	NV12	 X 	SYS	32-63	1		N/A
NIC0	PXB	SYS	SYS	SYS	 X

Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes (e.g., QPI/UPI)
"""


@pytest.mark.parametrize(
    ("link", "state", "printed"),
    [
        ("NV6", "ok", "interconnect of 4 GPUs: NV6 (4 pairs), NV12 (2 pairs)"),
        (
            "SYS",
            "warning",
            "interconnect of 4 GPUs: SYS (4 pairs), NV12 (2 pairs): some are connected",
        ),
    ],
)
def test_gpus_connected_through_the_cpus_get_a_warning(
    monkeypatch, link: str, state: str, printed: str
) -> None:
    monkeypatch.setattr(machine, "_output", lambda *_: TOPOLOGY.format(link=link).splitlines())
    line = machine._interconnect()
    assert line.state == state
    assert line.found.startswith(printed)


def test_gpus_that_torch_does_not_see_fail_only_a_job_that_needs_them(
    packed, tmp_path, capsys, monkeypatch
) -> None:
    # Regression: a CPU run was refused when the GPUs were hidden from it.
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf '0\\n1\\n'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    passed, lines = run_doctor(packed, capsys)
    assert passed
    assert (lines["gpus"][0].state, lines["gpus"][0].found[:22]) == ("warning", "nvidia-smi sees 2 GPUs")
    _, lines = run_doctor(packed, capsys, profile="gpu")
    assert [line.state for line in lines["gpus"]] == ["failure", "failure"]


def test_a_gpu_that_does_not_compute_is_named(monkeypatch) -> None:
    def ones(*_: object, device: str) -> torch.Tensor:
        if device == "cuda:1":
            raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nMore of it")
        return torch.full((3,), 1.0)

    monkeypatch.setattr(torch, "ones", ones)
    assert list(machine._check_compute(0)) == []
    (line,) = machine._check_compute(1)
    assert line.state == "failure"
    assert line.found == "GPU 1 does not compute: CUDA error: uncorrectable ECC error encountered"


def test_a_step_that_exceeds_gpu_memory_is_refused(packed, capsys, monkeypatch) -> None:
    def full(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore of it")

    monkeypatch.setattr(throughput, "training_step", full)
    monkeypatch.setattr(throughput, "_LOAD_S", 0.1)
    # Without METEOR, which takes seconds.
    monkeypatch.setattr(machine, "EXPECTED", {"BLEU-4": machine.EXPECTED["BLEU-4"]})
    passed, lines = run_doctor(packed, capsys, quick=False)
    assert not passed
    assert "does not fit into the GPU's memory (CUDA out of memory" in failures(lines)["finish"]
    assert "lower it" in failures(lines)["finish"]


def test_without_a_config_only_this_machine_is_checked(capsys) -> None:
    options = {"nodes": None, "gpus": None, "time_limit": None, "profile": None}
    assert doctor(None, out=None, quick=True, as_json=False, **options)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in printed[:-1]] == ["versions", "gpus", "java"]
    assert printed[-1].startswith("doctor: 3 ok, 0 warnings, 0 failures; the job can start")


def test_unmeasured_checks_are_not_counted_as_ok(capsys) -> None:
    options = {"out": None, "gpus": None, "time_limit": None, "quick": True, "as_json": False}
    doctor(lambda: toml.load("quickstart"), nodes=2, profile="cpu", **options)
    *printed, summary = capsys.readouterr().out.splitlines()
    unknown = sum("not measured" in line for line in printed)
    assert unknown > 0
    assert f", {unknown} not measured, " in summary
    assert f"doctor: {sum(line.startswith('ok ') for line in printed) - unknown} ok, " in summary


def test_a_failure_exits_with_code_1(tmp_path, capsys) -> None:
    options: argparse.Namespace = parser().parse_args(
        ["doctor", "quickstart", "--quick", "--set", f"data.shards={tmp_path}/gone"]
    )
    with pytest.raises(SystemExit) as ended:
        options.handler(options)
    assert ended.value.code == 1
    assert "the job would fail" in capsys.readouterr().out


@pytest.mark.parametrize("count", [2, 3, 4, 7, 8])
def test_each_pair_of_nodes_meets_once_and_no_node_has_two_pairs_in_a_round(count: int) -> None:
    nodes = list(range(count))
    rounds = [list(_rounds(nodes, node)) for node in nodes]
    pairs = sorted(pair for each in rounds for pair in each)
    assert pairs == sorted(2 * [(left, right) for left in nodes for right in nodes if left < right])
    if count % 2 == 0:
        for number in range(count - 1):
            assert sorted(node for pair in {each[number] for each in rounds} for node in pair) == nodes


def test_slow_and_dead_links_and_missing_nodes_are_named() -> None:
    hosts = {0: "a", 1: "b", 2: "c", 3: "d"}
    speeds: dict[str, float | str] = {
        "0-1": 1e9,
        "0-2": 1.1e9,
        "0-3": 0.9e9,
        "1-2": 1e9,
        "1-3": 1e8,
        "2-3": "timed out",
    }
    lines = list(report_links(hosts, 5, speeds))
    assert [(line.state, line.found.split(":")[0]) for line in lines] == [
        ("failure", "node 4 of 5 did not connect within 20 s"),
        ("warning", "all-reduce between b and d"),
        ("failure", "no all-reduce between c and d (timed out)"),
        ("ok", "all-reduce between 5 pairs of 4 nodes, over gloo (TCP)"),
    ]


def _connect(count: int, port: str, out: Path) -> None:
    network._MEET_S = 8.0
    node = int(os.environ["RANK"])
    nodes = network.rendezvous(node, count, "localhost", int(port))
    lines = [line.found for line in network.check_links(nodes)]
    refused = nodes.share_verdict(node == 0, 10)
    (out / f"{node}.json").write_text(json.dumps([lines, refused]))


def test_connected_nodes_are_measured_and_a_missing_one_is_named(tmp_path, unused_port) -> None:
    for process in spawn_ranks(2, _connect, 3, str(unused_port), tmp_path):
        process.wait(600)
        assert process.returncode == 0
    (first, refused), (second, received) = (
        json.loads((tmp_path / f"{node}.json").read_text()) for node in (0, 1)
    )
    assert "node 2 of 3 did not connect" in first[0]
    assert "all-reduce between 1 pairs of 2 nodes" in first[1]
    assert (second, refused, received) == ([], True, True)


def test_a_node_that_connects_too_late_reports_it(unused_port) -> None:
    from torch.distributed import TCPStore

    # Regression: a KeyError, as its name was not among the connected nodes.
    store = TCPStore("localhost", unused_port, None, True, wait_for_workers=False)
    store.set("connected", "[0]")
    store.set("host/0", "first")
    with pytest.raises(RuntimeError, match="this node connected more than 20 s after the first one"):
        network.rendezvous(1, 2, "localhost", unused_port)


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.create_server(("localhost", 0)) as free:
        return int(free.getsockname()[1])
