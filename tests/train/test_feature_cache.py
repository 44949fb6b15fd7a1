"""The cache of features: it changes no loss, and a file is complete or absent."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from experiment import join_all, logged_losses, start_training, tiny_config

from captionscale.config_model import TorchvisionConfig as Settings
from captionscale.data import decode, transforms
from captionscale.data import feature_cache as feature_files
from captionscale.data.loader import Loader
from captionscale.data.shards import Split
from captionscale.data.storage import RemoteStorage, open_storage
from captionscale.distributed.ranks import Ranks
from captionscale.errors import PreemptedError, UserError
from captionscale.files import lock
from captionscale.model.encoders.torchvision import TorchvisionEncoder as Encoder
from captionscale.train import feature_cache
from captionscale.train.feature_cache import cache_features
from captionscale.train.loop import train
from captionscale.vocab import Vocabulary

CHANGES = (
    'model.encoder.trainable="none"',
    "data.crop_scale=[1, 1]",
    "data.flip=false",
    "data.color_jitter=0",
    "train.epochs=1",
)
WORDS = Vocabulary(("<pad>", "<start>", "<end>", "<unk>"))


@pytest.fixture
def shards(packed: Path, tmp_path: Path) -> Path:
    return shutil.copytree(packed, tmp_path / "shards")


def build(**changes: object) -> Encoder:
    torch.manual_seed(0)
    return Encoder(Settings.model_validate({"name": "resnet18", "weights": "none", **changes})).train()


def loaders(shards: Path, *names: str, **data: object) -> list[Loader]:
    settings = tiny_config(shards.parent, shards, *CHANGES).data.model_copy(update=data)
    return [Loader(Split(shards, name), WORDS, settings) for name in names or ("train", "val")]


def cache(encoder: Encoder, splits: list[Loader], precision: str = "fp32") -> list[Path]:
    """Return the files of features."""
    with Ranks(precision) as ranks:
        cache_features(encoder, splits, ranks, precision)
    return [each.features.path for each in splits]


def test_a_file_holds_the_features_of_each_image_in_the_order_of_the_index(shards: Path) -> None:
    encoder, (train_split, val) = build(), loaders(shards)
    paths = cache(encoder, [train_split, val])
    assert sorted(path.name for path in (shards / "features").iterdir()) == sorted(
        [".lock", *(path.name for path in paths)]
    )
    features = np.load(paths[0], mmap_mode="r")["features"]
    assert (features.shape, features.dtype) == ((48, 1, 512), np.float16)
    images = [decode.decode_image(train_split.split.image(item), "here") for item in range(48)]
    pixels = np.stack([transforms.center_crop(image, 32) for image in images])
    with torch.no_grad():
        expected = encoder(torch.from_numpy(pixels).permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(features, expected, rtol=1e-3, atol=1e-4)
    items = np.array([40, 3, 7])
    (batch,) = train_split.prefetch([(items, 5)])
    assert batch.images.dtype == torch.float16
    np.testing.assert_array_equal(batch.images.numpy(), features[items])
    assert batch.image_ids == train_split.split.index["image_id"][items].tolist()


def test_cached_images_are_not_decoded(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache(build(), loaders(shards))
    again = loaders(shards)
    monkeypatch.setattr(decode, "decode_image", None)
    cache(build(), again)
    assert len(next(iter(again[0].prefetch([(np.arange(9), 0)]))).images) == 9


def test_the_file_name_depends_on_all_that_features_depend_on(shards: Path) -> None:
    other = build()
    with torch.no_grad():
        other.backbone.layer1[0].bn1.running_mean += 1e-6
    found = [
        cache(build(), loaders(shards, "val")),
        cache(other, loaders(shards, "val")),
        cache(build(output_stride=16), loaders(shards, "val")),
        cache(build(), loaders(shards, "val", image_size=64)),
        cache(build(), loaders(shards, "val"), "bf16"),
        cache(build(), loaders(shards, "test")),
    ]
    assert len({path.name for paths in found for path in paths}) == 6
    assert cache(build(), loaders(shards, "val", workers=2, max_words=3)) == found[0]


# Measured: fp32 5e-6, as half precision rounds features by 5e-4; bf16 0, as it holds those of bf16 exactly.
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 5e-5), ("bf16", 1e-6)])
def test_a_run_with_cached_features_has_the_losses_of_one_without(
    shards: Path, tmp_path: Path, precision: str, tolerance: float, capfd: pytest.CaptureFixture[str]
) -> None:
    changes = (*CHANGES, "data.image_size=64", f"train.precision={precision}")
    train(tiny_config(tmp_path, shards, *changes), tmp_path / "without")
    expected = [
        (step, pytest.approx(loss, abs=tolerance)) for step, loss in logged_losses(tmp_path / "without")
    ]
    cached = tiny_config(tmp_path, shards, *changes, "train.cache_features=true")
    train(cached, tmp_path / "one")
    assert logged_losses(tmp_path / "one") == expected
    stderr = capfd.readouterr().err
    assert "computing features of 48 images (16 x 32 numbers each), once: 0.00 GB in" in stderr
    shutil.rmtree(shards / "features")
    join_all(start_training(2, cached, tmp_path / "two"))
    assert logged_losses(tmp_path / "two") == expected
    assert len(list((shards / "features").glob("*.npy"))) == 2


def test_a_partial_file_is_continued_and_a_torn_one_restarted(
    shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(feature_cache, "_BATCH_SIZE", 2)
    (path,) = cache(build(), loaders(shards, "val"))
    whole, row = path.read_bytes(), 8 + 2 * 512
    partial = path.rename(path.with_name(path.name + ".tmp"))
    # Rows 2 to 5 were not written yet.
    begin = len(whole) - 8 * row
    partial.write_bytes(whole[: begin + 2 * row] + bytes(4 * row) + whole[begin + 6 * row :])
    capsys.readouterr()
    assert cache(build(), loaders(shards, "val")) == [path]
    assert "computing features of 4 images" in capsys.readouterr().err
    assert path.read_bytes() == whole
    path.rename(partial).write_bytes(whole[:700])
    (shards / "features" / "train-0123456789abcdef.npy.tmp").write_bytes(b"begun")
    assert cache(build(), loaders(shards, "val")) == [path]
    assert path.read_bytes() == whole
    assert not list((shards / "features").glob("*.tmp"))


def test_a_preempted_computation_of_features_is_continued_by_the_next_run(
    shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(feature_cache, "_BATCH_SIZE", 2)
    asked = iter([False, False, True])
    monkeypatch.setattr(feature_cache.preemption, "requested", lambda: next(asked))
    with pytest.raises(PreemptedError, match="stopped before the features of all images were computed"):
        cache(build(), loaders(shards, "val"))
    monkeypatch.setattr(feature_cache.preemption, "requested", lambda: False)
    capsys.readouterr()
    (path,) = cache(build(), loaders(shards, "val"))
    assert "computing features of 4 images" in capsys.readouterr().err
    assert len(np.load(path)) == 8


def test_a_damaged_row_is_an_error_when_it_is_read(shards: Path) -> None:
    (loader,) = splits = loaders(shards, "val")
    (path,) = cache(build(), splits)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    cache(build(), splits)
    assert len(next(loader.prefetch([(np.array([6]), None)])).images) == 1
    with pytest.raises(UserError, match=r"row 7 is damaged, expected .*; delete the file"):
        next(loader.prefetch([(np.array([7]), None)]))


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda data: data[:-2], r"damaged \(8,446 bytes\)"),
        (lambda data: data + b"\0", r"damaged \(8,449 bytes\)"),
        (lambda data: data[:0], r"damaged \(another header\)"),
        (lambda data: data.replace(b"'<f2'", b"'<f4'"), r"damaged \(another header\)"),
        (lambda data: data.replace(b"(1, 512)", b"(2, 256)"), r"damaged \(another header\)"),
    ],
)
def test_a_damaged_file_is_refused_and_the_cure_is_to_delete_it(shards: Path, damage, found: str) -> None:
    (path,) = cache(build(), loaders(shards, "val"))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=f"{path}: {found}, expected 8,448 bytes .* delete it"):
        cache(build(), loaders(shards, "val"))
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=f"{path}: Is a directory"):
        cache(build(), loaders(shards, "val"))


def test_features_that_half_precision_cannot_hold_are_refused_and_leave_no_file(shards: Path) -> None:
    encoder = build()
    with torch.no_grad():
        encoder.backbone.layer4[1].bn2.bias += 7e4
    with pytest.raises(UserError, match=r"is 7[\d.]+, expected at most 65504"):
        cache(encoder, loaders(shards))
    assert not list((shards / "features").glob("*.npy"))


def test_a_folder_that_another_process_fills_is_refused_unless_all_is_there(shards: Path) -> None:
    cache(build(), loaders(shards, "val"))
    with lock(shards / "features", "captionscale train"):
        cache(build(), loaders(shards, "val"))
        with pytest.raises(UserError, match=r"features: in use by captionscale train"):
            cache(build(), loaders(shards))


def test_a_disk_without_space_is_refused_before_features_are_computed(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(shards)._replace(free=30_000)
    monkeypatch.setattr(feature_files.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"0\.00 GB are free, expected 0\.00 GB for the features of 56"):
        cache(build(), loaders(shards))
    assert not (shards / "features").exists()


def test_an_unwritable_folder_and_a_url_are_refused(shards: Path) -> None:
    (shards / "features").write_text("a file where the folder is to be")
    with pytest.raises(UserError, match="features: "):
        cache(build(), loaders(shards))
    place = open_storage("https://example.org/coco")
    assert isinstance(place, RemoteStorage)
    with pytest.raises(UserError, match=r"data\.shards = https://example.org/coco: is a URL"):
        feature_files.features_folder(place)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused(shards: Path) -> None:
    shards.chmod(0o555)
    with pytest.raises(UserError, match="permission denied, expected to keep features there"):
        cache(build(), loaders(shards))
    shards.chmod(0o755)
