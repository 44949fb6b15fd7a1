"""Fixtures of many tests: synthetic images in COCO's layout, and the shards made from them.

captionscale is imported inside the fixtures: jaxtyping can check only what is imported after it.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import rmtree
from typing import Any

import pytest

# Before torch is imported, here and in what tests start: they compute little, and threads of several
# processes would fight for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Programs that tests start train with tiny_encoder.py.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH")))
)
# Each worker and each process that a test starts would compile our modules again.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

COUNTS = {"train": 48, "val": 8, "test": 8}
IMAGES_PER_SHARD = 16
SHARED = Path(__file__).parents[2] / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the modules that take longest, so that none of them is left for the end."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real data sets, next to the checkout on some machines."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared/data next to the checkout")
    return SHARED


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a folder that the first of all workers made; nobody may change it."""
    from filelock import FileLock

    base = factory.getbasetemp()
    # A worker's folder lies in that of all.
    out = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"shared-{name}" / name
    with FileLock(out.parent.with_suffix(".lock")):
        if not out.exists():
            making = out.parent / "making" / name
            # Of a worker that failed.
            rmtree(making.parent, ignore_errors=True)
            make(making)
            making.rename(out)
            making.parent.rmdir()
    return out


@pytest.fixture(scope="session")
def synthetic_coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in COCO 2017 layout: 48 train, 8 val and 8 test images of 64 pixels. Not to be changed."""
    from captionscale.data.synthetic import write_coco

    return made_once(tmp_path_factory, "scenes", lambda out: write_coco(out, counts=COUNTS, size=64))


@pytest.fixture(scope="session")
def packed(synthetic_coco: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shards of `synthetic_coco`, 16 images each: three of train, one of val and test. Read-only."""
    from captionscale.data.packing import PackOptions, pack
    from captionscale.data.sources import coco

    def make(out: Path) -> None:
        for split in COUNTS:
            captions = synthetic_coco / "annotations" / f"captions_{split}2017.json"
            records = coco.read_official(synthetic_coco / f"{split}2017", captions, split)
            pack(records, out, sources=[captions], options=PackOptions(images_per_shard=IMAGES_PER_SHARD))

    return made_once(tmp_path_factory, "shards", make)


@pytest.fixture(scope="session")
def trained(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of `experiment.tiny_config`: six steps, scored and saved after each third. Read-only."""
    from experiment import tiny_config

    from captionscale.train.loop import train

    def make(out: Path) -> None:
        out.mkdir(parents=True)
        train(tiny_config(out, packed), out / "run")

    return made_once(tmp_path_factory, "trained", make) / "run"


@pytest.fixture(scope="session", autouse=True)
def forked() -> Iterator[None]:
    """Python programs are forked from a server that has imported torch, instead of started: see forked.py."""
    from forked import programs

    with programs():
        yield


@pytest.fixture
def started() -> Iterator[None]:
    """Programs are started, for a test of the start itself, of imports, or of what /proc shows."""
    from forked import programs

    with programs(forked=False):
        yield


@pytest.fixture(scope="module")
def warm_meteor(synthetic_coco: Path) -> Iterator[None]:
    """METEOR is loaded once for all commands of a module that score captions of `synthetic_coco`."""
    from captionscale.score import metrics
    from captionscale.tools import quickstart
    from captionscale.tools.doctor import machine
    from captionscale.train import scst_checks

    references = [text for texts in machine.REFERENCES.values() for text in texts]
    for split in ("val", "test"):
        document = json.loads((synthetic_coco / "annotations" / f"captions_{split}2017.json").read_text())
        references += [line["caption"] for line in document["annotations"]]
    with metrics.Evaluator() as evaluator, pytest.MonkeyPatch.context() as patch:
        # It starts again for references that are not among the first ones.
        evaluator.measure({0: references[0]}, {0: references}, ["METEOR"])

        def measure(*texts: Any, **options: object) -> Any:
            assert not options.pop("reference_implementation", False)
            assert {*options} <= {"meteor_gb", "workers"}
            return evaluator.measure(*texts)

        # All that hold it by name: one imported later would keep this one.
        for module in (metrics, machine, quickstart, scst_checks):
            patch.setattr(module, "measure", measure)
        yield


@pytest.fixture(scope="module")
def s3_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A client of a server of S3's protocol, as a user names one: by the environment; it has a `bucket`."""
    moto = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    from botocore.session import get_session

    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    # One of another module still asks that one's server.
    s3fs.S3FileSystem.clear_instance_cache()
    host, port = server.get_host_and_port()
    nothing = tmp_path_factory.mktemp("home") / "nothing"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "me")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_CONFIG_FILE", str(nothing))
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(nothing))
        client = get_session().create_client("s3")
        client.create_bucket(Bucket="bucket")
        yield client
    server.stop()
