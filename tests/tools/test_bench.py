import json
import re
from pathlib import Path

import pytest
from experiment import tiny_config

from captionscale import cli
from captionscale.errors import UserError
from captionscale.tools.bench import check, cluster, scale
from captionscale.tools.bench.cluster import Work

ONE = {"save": {"a table": {"torch.save": 4.0, "the limit": 0.8}}, "pack": {"another": {"tar": 0.7}}}


@pytest.mark.parametrize(
    ("now", "lost"),
    [
        (4.0, []),
        (2.0, []),
        (9.0, []),
        (1.99, ["torch.save"]),
        (None, ["torch.save"]),
        (float("nan"), ["torch.save"]),
    ],
)
def test_a_ratio_has_fallen_below_half_of_the_committed_one_or_when_it_is_not_measured(now, lost) -> None:
    ways = {"the limit": 0.8} | ({} if now is None else {"torch.save": now})
    measured = {**ONE, "save": {"a table": ways}, "new": {"a table": {"webdataset": 0.1}}}
    assert [way for _, _, way, _, _ in check.fallen(measured, ONE)] == lost


def test_the_sum_of_all_gpus_takes_what_its_formula_says() -> None:
    one, two, many = (cluster.all_reduce_s(1e9, nodes, 100) for nodes in (1, 2, 128))
    assert one == pytest.approx(2 * 7 / 8 * 1e9 / 450e9)
    assert two - one == pytest.approx(1e9 / (0.85 * 12.5e9), rel=1e-4)
    assert many - one == pytest.approx(2 * 127 / 128 * 1e9 / (0.85 * 12.5e9) + 2 * 127 * 2e-6)


def test_steps_on_a_cluster_are_those_of_a_model_made_elsewhere() -> None:
    # Of 34 ms, 44 million numbers; per cent on 2 and on 128 nodes. Line rate and hops were set to meet them.
    work = Work(0.034, 32, 44_000_000)
    expected = {
        (4, 25): (42, 23),
        (4, 100): (94, 66),
        (4, 400): (98, 95),
        (2, 25): (71, 41),
        (2, 100): (97, 93),
        (2, 400): (99, 97),
    }
    for (width, rate), both in expected.items():
        found = [100 * 0.034 / cluster.step_s(work, nodes, rate, width) for nodes in (2, 128)]
        assert found == pytest.approx(both, abs=1.05)


def test_a_model_that_learns_nothing_sends_nothing() -> None:
    assert cluster.step_s(Work(0.034, 32, 0), 128, 25, 4) == 0.034


@pytest.fixture
def ratios(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "RATIOS", tmp_path / "ratios.toml")


@pytest.mark.usefixtures("ratios")
def test_ratios_that_are_written_hold_until_ours_gets_slower(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_config(tmp_path, packed)
    small = {"save": [str(tmp_path / "experiment.toml"), "--rounds", "1", "--folder", str(tmp_path)]}
    check.quick(small, check=False, write=True, as_json=True)
    told = json.loads(capsys.readouterr().out)
    (table,) = told["tables"]
    assert {"bench", "title", "columns", "rows", "notes", "unit", "lanes"} == set(table)
    assert table["bench"] == "save"
    assert "torch" in told["machine"]
    found = check.ratios(told["tables"])
    # What is written is what was measured, to three digits.
    assert list(check.fallen(found, check._committed())) == []
    ways = check._committed()["save"][table["title"]]
    assert "torch.save" in ways
    slower = {"save": {table["title"]: {way: 0.45 * ratio for way, ratio in ways.items()}}}
    with pytest.raises(UserError, match=r"4 of 4 ratios are below 50% .* renew ratios.toml by --write"):
        check._refuse_fallen(slower, check._committed())
    assert "Ratios that have fallen" in capsys.readouterr().err


@pytest.mark.usefixtures("ratios")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench"], "wanted WHAT, or --quick"),
        (["bench", "--check", "save"], "wanted WHAT, or --quick"),
        (["bench", "--quick", "order"], "did you mean 'score'"),
        (["bench", "--quick", "save", "--rounds", "9"], "--quick sets all sizes, wanted no rounds"),
        (["bench", "scale", "--gpu-name", "H100"], "--gpu-name H100: without --step-ms"),
        (["bench", "scale", "--step-ms", "nan"], "--step-ms nan: wanted the milliseconds"),
        (["bench", "scale", "--step-ms", "0"], "--step-ms 0: wanted the milliseconds"),
    ],
    ids=" ".join,
)
def test_what_cannot_be_measured_is_refused(arguments, message, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 1
    assert re.search(message, capsys.readouterr().err)


def test_two_processes_train_beside_one(packed: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, packed, "train.global_batch=8")
    strong, weak, *predicted = scale._measured(config, tmp_path, rounds=1)
    for heat in (strong, weak):
        assert [lane.name for lane in heat.lanes] == ["two processes", "one process"]
        assert all(lane.cpu_ms > 0 for lane in heat.lanes)
    assert [sheet.title.split(":")[0] for sheet in predicted] == ["Predicted"] * 3
