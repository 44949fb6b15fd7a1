import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from captionscale.config import Data
from captionscale.data import decode, transforms
from captionscale.data.feature_cache import FeatureFile
from captionscale.data.loader import Batch, Loader
from captionscale.data.packing import PackOptions, pack
from captionscale.data.shards import Split
from captionscale.data.sources.record import Record
from captionscale.errors import UserError
from captionscale.train.losses import Target
from captionscale.vocab import END, PAD, START, Vocabulary, build, split_words

SIZE = 32
MAX_WORDS = 7


def load(folder: Path, name: str = "train", seed: int = 0, **changes: object) -> Loader:
    split = Split(folder, name)
    captions = [caption for each in split.references().values() for caption in each]
    settings = {"image_size": SIZE, "max_words": MAX_WORDS, "crop_scale": (0.5, 1.0), "color_jitter": 0.2}
    data = Data.model_validate({"shards": str(folder), **settings, **changes})
    return Loader(split, build(captions, min_count=1, max_vocab_size=None), data, seed)


@pytest.fixture(scope="module")
def loader(packed: Path) -> Iterator[Loader]:
    loader = load(packed)
    yield loader
    loader.close()


@pytest.fixture(scope="module")
def ragged(synthetic_coco: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loader]:
    """Images with one to four captions of very different lengths."""
    words = [word * 3 for word in "abcdefghijkl"]
    files = sorted((synthetic_coco / "val2017").iterdir())
    records = [
        Record(
            90 - 7 * item,
            "train",
            tuple(" ".join(words[: item + n]) for n in range(1, 2 + item % 4)),
            str(file.parent),
            file.name,
        )
        for item, file in enumerate(files)
    ]
    out = tmp_path_factory.mktemp("ragged") / "shards"
    pack(records, out, sources=[])
    loader = load(out)
    yield loader
    loader.close()


def same(first: Batch, second: Batch) -> bool:
    return (
        torch.equal(first.images, second.images)
        and torch.equal(first.tokens, second.tokens)
        and torch.equal(first.image_index, second.image_index)
        and first.image_ids == second.image_ids
    )


def fetch(loader: Loader, numbers: np.ndarray, epoch: int | None) -> Batch:
    return next(loader.prefetch([(numbers, epoch)]))


def items(*numbers: int) -> np.ndarray:
    return np.array(numbers)


# ---- images


def test_the_same_items_and_epoch_give_the_same_bytes(packed: Path, loader: Loader) -> None:
    other = load(packed, workers=1)
    for numbers in (items(3, 40, 11), items(0), items(47, 3)):
        batch = fetch(loader, numbers, 2)
        assert same(batch, fetch(loader, numbers, 2))
        assert same(batch, fetch(other, numbers, 2))
    other.close()


def test_an_image_does_not_depend_on_its_batch(loader: Loader) -> None:
    numbers = items(9, 30, 2, 41)
    batch = fetch(loader, numbers, 1)
    for row, item in enumerate(numbers.tolist()):
        assert torch.equal(batch.images[row], fetch(loader, items(item), 1).images[0])


def test_another_epoch_seed_or_item_is_augmented_differently(packed: Path, loader: Loader) -> None:
    other = load(packed, seed=1)
    views = [fetch(loader, items(5), epoch).images for epoch in range(4)] + [fetch(other, items(5), 0).images]
    assert len({view.numpy().tobytes() for view in views}) == 5
    other.close()


def test_without_an_epoch_images_are_center_crops(loader: Loader) -> None:
    numbers = items(4, 17, 33)
    batch = fetch(loader, numbers, None)
    assert batch.images.dtype == torch.uint8
    for view, item in zip(batch.images, numbers.tolist(), strict=True):
        image = decode.decode_image(loader.split.image(item), "here")
        np.testing.assert_array_equal(view.permute(1, 2, 0).numpy(), transforms.center_crop(image, SIZE))


def test_images_are_resized_as_the_encoder_declares(loader: Loader) -> None:
    cubic = Loader(loader.split, loader.vocabulary, loader.data, interpolation="bicubic")
    image = decode.decode_image(loader.split.image(4), "here")
    view = fetch(cubic, items(4), None).images[0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(view, transforms.center_crop(image, SIZE, "bicubic"))
    assert not same(fetch(cubic, items(4), 0), fetch(loader, items(4), 0))
    cubic.close()


def test_without_augmentation_an_epoch_has_center_crops_too(packed: Path, loader: Loader) -> None:
    plain = load(packed, crop_scale=(1, 1), flip=False, color_jitter=0)
    assert same(fetch(plain, items(1, 2), 3), fetch(loader, items(1, 2), None))
    plain.close()


def test_rotation_is_for_training_only(packed: Path, loader: Loader) -> None:
    turned = load(packed, rotate=20.0)
    assert not torch.equal(fetch(turned, items(5), 0).images, fetch(loader, items(5), 0).images)
    assert same(fetch(turned, items(5), 0), fetch(turned, items(5), 0))
    assert same(fetch(turned, items(5), None), fetch(loader, items(5), None))
    turned.close()


def test_with_cached_features_a_batch_has_them_and_no_image_is_read(
    loader: Loader, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    numbers = items(40, 3, 3, 17)
    expected = fetch(loader, numbers, None)
    features = np.random.default_rng(0).random((48, 4, 5)).astype(np.float16)
    monkeypatch.setattr(Split, "image", None)
    file = FeatureFile(tmp_path / "train.npy", features.shape)
    file.create()
    file.write(0, features)
    file.finish()
    cached = Loader(loader.split, loader.vocabulary, loader.data, features=file.open())
    batch = fetch(cached, numbers, 3)
    assert batch.images.dtype == torch.float16
    np.testing.assert_array_equal(batch.images.numpy(), features[numbers])
    assert torch.equal(batch.tokens, expected.tokens)
    assert batch.image_ids == expected.image_ids
    assert batch.to(torch.device("meta")).images.shape == (4, 4, 5)
    cached.close()


ALONE = """
import os, sys
from pathlib import Path
import numpy as np, torch
from captionscale.config import Data
from captionscale.data.loader import Loader
from captionscale.data.shards import Split
from captionscale.vocab import SPECIAL_TOKENS, Vocabulary

own = torch.get_num_threads()
before = len(os.listdir("/proc/self/task"))
# Large enough to be worth several threads to torch.
data = Data(shards=sys.argv[1], image_size=448, workers=2, rotate=5.0)
loader = Loader(Split(Path(sys.argv[1]), "train"), Vocabulary(SPECIAL_TOKENS), data)
list(loader.prefetch((np.arange(8), epoch) for epoch in range(3)))
print(own, torch.get_num_threads(), len(os.listdir("/proc/self/task")) - before)
"""


def test_decoding_threads_use_one_torch_thread_and_others_keep_theirs(packed: Path) -> None:
    # Those of each would fight for the cores with those of all others.
    found = subprocess.run(
        [sys.executable, "-c", ALONE, packed],
        env=os.environ | {"OMP_NUM_THREADS": "4"},
        capture_output=True,
        text=True,
        check=True,
    )
    own, after, added = found.stdout.split()
    assert after == own
    assert added == "2"


def test_pixels_are_channels_last_in_memory(loader: Loader) -> None:
    batch = fetch(loader, items(1, 2, 3), 0)
    assert batch.images.shape == (3, 3, SIZE, SIZE)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)


# ---- captions


@pytest.mark.parametrize("which", ["loader", "ragged"])
def test_every_image_comes_with_all_its_captions(which: str, request: pytest.FixtureRequest) -> None:
    loader: Loader = request.getfixturevalue(which)
    split, vocabulary = loader.split, loader.vocabulary
    numbers = np.random.default_rng(0).permutation(len(split))
    batch = fetch(loader, numbers, 0)
    assert batch.image_ids == [split.sample(item).image_id for item in numbers.tolist()]
    said = [
        (row, " ".join(split_words(caption)[:MAX_WORDS]))
        for row, item in enumerate(numbers.tolist())
        for caption in split.captions(item)
    ]
    decoded = [vocabulary.decode(row) for row in batch.tokens.tolist()]
    assert list(zip(batch.image_index.tolist(), decoded, strict=True)) == said


def test_tokens_are_start_words_end_and_as_little_padding_as_possible(ragged: Loader) -> None:
    batch = fetch(ragged, np.arange(len(ragged.split)), None)
    longest = 0
    for row in batch.tokens.tolist():
        end = row.index(END)
        assert row[0] == START
        assert all(token > END for token in row[1:end])
        assert set(row[end + 1 :]) <= {PAD}
        longest = max(longest, end + 1)
    assert batch.tokens.shape[1] == longest == MAX_WORDS + 2


def test_targets_are_words_and_end_tokens(loader: Loader, ragged: Loader) -> None:
    for each in (loader, ragged):
        numbers = np.arange(min(8, len(each.split)))
        captions = [caption for item in numbers.tolist() for caption in each.split.captions(item)]
        expected = sum(min(len(split_words(caption)), MAX_WORDS) + 1 for caption in captions)
        batch = fetch(each, numbers, 0)
        assert Target(batch.images, batch.tokens, batch.image_index).num_tokens.tolist() == [0, expected]


def test_a_word_that_the_vocabulary_lacks_is_unknown(loader: Loader) -> None:
    few = Vocabulary(loader.vocabulary.words[:9])
    batch = fetch(Loader(loader.split, few, loader.data), items(0, 1), None)
    assert int(batch.tokens.max()) < 9
    assert batch.tokens.shape == fetch(loader, items(0, 1), None).tokens.shape


# ---- prefetch


@pytest.mark.parametrize("depth", [0, 1, 3, 50])
def test_prefetch_yields_the_batches_in_order(loader: Loader, depth: int) -> None:
    random = np.random.default_rng(1)
    requests = [(random.integers(48, size=random.integers(1, 6)), epoch) for epoch in (0, 0, None, 1, 1, 2)]
    found = list(loader.prefetch(requests, depth))
    assert len(found) == len(requests)
    for batch, (numbers, epoch) in zip(found, requests, strict=True):
        assert same(batch, fetch(loader, numbers, epoch))


def test_prefetch_requests_no_more_than_its_depth(loader: Loader) -> None:
    asked = 0

    def requests() -> Iterator[tuple[np.ndarray, int]]:
        nonlocal asked
        for number in range(10):
            asked += 1
            yield items(number), 0

    for used, _ in enumerate(loader.prefetch(requests(), depth=3), start=1):
        assert asked == min(10, used + 3)


# ---- the rest


def test_a_batch_moves_with_all_that_is_in_it(loader: Loader) -> None:
    batch = fetch(loader, items(1, 2), 0)
    assert same(batch.to(torch.device("cpu")), batch)
    assert batch.to(torch.device("meta")).images.device.type == "meta"


def test_a_damaged_image_is_named_by_its_folder_and_id(synthetic_coco: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    whole = min((synthetic_coco / "val2017").iterdir()).read_bytes()
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
    record = Record(391895, "train", ("a dog",), str(tmp_path), "half.jpg")
    pack([record], out, sources=[], options=PackOptions(full_decode=False))
    loader = load(out)
    with pytest.raises(UserError, match=f"{out}: image 391895: not a readable image"):
        fetch(loader, items(0), 0)
    loader.close()
