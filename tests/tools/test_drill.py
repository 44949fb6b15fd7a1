"""The command `drill`: real launches and kills, and its verdict on runs that differ."""

import json
from pathlib import Path

import pytest
from experiment import tiny_config

from captionscale.errors import UserError
from captionscale.tools import drill


def run_drill(folder: Path, packed: Path, *changes: str, **options: object) -> bool:
    settings = tiny_config(folder, packed, *changes)
    given = {"profile": "cpu", "ranks": (1, 2), "kills": 1, "steps": 6, "seed": 0, **options}
    return drill.drill(settings, folder / "drill", **given)


def test_a_run_killed_and_resumed_is_one_result_and_a_changed_sample_log_is_found(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_drill(tmp_path, packed, "train.micro_batch=4")
    said = capsys.readouterr().out
    assert "each sample of each epoch exactly once" in said
    assert said.splitlines()[-1].startswith("one result: 6 steps, killed 1 times on ")
    with pytest.raises(UserError, match="holds an earlier drill, expected none"):
        run_drill(tmp_path, packed)

    out = tmp_path / "drill"
    book = max(out.joinpath("killed", "sample_log").iterdir())
    first, *others = book.read_text().splitlines()
    line = json.loads(first)
    line["image_ids"][0] = line["image_ids"][1]
    book.write_text("\n".join([json.dumps(line), *others]))
    log = out / "killed" / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    lines[-1]["loss"] = lines[-1].get("loss", 0) + 1
    log.write_text("\n".join(map(json.dumps, lines)))
    split = drill.Split(packed, "train")
    settings = drill.toml.load(out / "experiment.toml")
    order = drill.make_sampler(split, settings)
    assert not drill._compare(out / "uninterrupted", out / "killed", [], order, split, settings)
    said = capsys.readouterr().out
    assert "1 samples too many" in said
    assert said.splitlines()[-1].startswith("DIFFERS: ")


@pytest.mark.parametrize(
    ("changes", "options", "named"),
    [
        (
            ['model.encoder={name="resnet18", weights="none", batch_norm="trained"}'],
            {},
            "pass --set model.encoder.batch_norm=frozen",
        ),
        ([], {"kills": 6}, "--kills 6: a run of 6 steps has too few"),
        ([], {"ranks": (1, 9)}, "holds 4 micro-batches of train.micro_batch = 4, expected one for each of 9"),
    ],
)
def test_what_cannot_be_drilled_is_refused_before_anything_starts(
    packed: Path, tmp_path: Path, changes: list[str], options: dict[str, object], named: str
) -> None:
    with pytest.raises(UserError) as caught:
        run_drill(tmp_path, packed, *changes, **options)
    assert named in str(caught.value)
    assert not (tmp_path / "drill").exists()
