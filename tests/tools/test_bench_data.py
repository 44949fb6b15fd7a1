import gc
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from captionscale.data import transforms
from captionscale.errors import UserError
from captionscale.files import cpu_count
from captionscale.tools.bench import data, start
from captionscale.tools.bench.race import Heat


@pytest.fixture
def _open_files() -> Iterator[None]:
    """webdataset leaves its last tar open in a cycle of references: let it be collected here, unheard."""
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):
        yield
        gc.collect()


@pytest.mark.usefixtures("_open_files")
def test_loading_is_measured_beside_others_that_show_the_same_pictures(
    synthetic_coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    heats = data.bench(synthetic_coco / "train2017", tmp_path, count=32, rounds=1)
    assert [heat.title for heat in heats] == [
        f"Loading, {kind}, {cores}"
        for kind in ("shorter side 256", "native size")
        for cores in ("one core", "two cores")
    ]
    for heat in heats:
        assert heat.lanes[0].name.startswith("captionscale")
        assert all(rate > 0 for lane in heat.lanes for rate in lane.per_second)
    assert torch.get_num_threads() == threads
    assert not list(tmp_path.iterdir())
    records = data._records(synthetic_coco / "train2017", tmp_path, 8)
    stored = data._store(records, tmp_path / "few", data.packing.PackOptions())
    assert "steps of 256 apart" in data._compare(stored)
    # Another crop is another picture.
    really = transforms.center_crop
    monkeypatch.setattr(transforms, "center_crop", lambda image, size: really(image[8:], size))
    with pytest.raises(UserError, match="the ways show other pictures"):
        data._compare(stored)


def test_loading_wants_photographs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \.jpg files; wanted a folder of photographs"):
        data.bench(tmp_path, tmp_path, count=8, rounds=1)


def test_first_batches_and_the_memory_of_a_loader_are_measured(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = data.Split(packed, "train")
    monkeypatch.setattr(start, "_BATCH", 8)
    heat = start._first_batches(split, 1)
    assert isinstance(heat, Heat)
    assert [lane.name for lane in heat.lanes] == ["resumed at 90 % of an epoch", "fresh"]
    assert len(start._memory(split).rows) == 4


def test_processes_side_by_side_have_the_threads_that_launch_gives_them_and_then_torchs_own() -> None:
    heat = start._two_processes(1)
    assert len(heat.lanes) == 3
    shared = max(1, cpu_count() // 2)
    [threads] = re.findall(r"processes: ([\d, ]+)\.", heat.notes[0])
    assert [int(each) for each in threads.split(",")][:2] == [shared, shared]
    assert heat.lanes[1].ratio[0] > 0
