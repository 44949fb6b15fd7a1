"""BLEU, ROUGE-L, CIDEr-D and the reward, compared with pycocoevalcap's and a plain implementation."""

import json
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from reward import PlainCiderD

from captionscale.score import bleu
from captionscale.score.ciderd import CiderDReward, cider_d
from captionscale.score.rouge import rouge_l

END = 2


def invent(seed, images, words, lengths, references=(1, 6), space=" "):
    """Return random candidates and references."""
    dice = random.Random(seed)

    def text():
        return space.join(f"w{dice.randrange(words)}" for _ in range(dice.choice(lengths)))

    candidates = [text() for _ in range(images)]
    return candidates, [[text() for _ in range(dice.randint(*references))] for _ in range(images)]


def check(candidates, references):
    """Assert that every value equals pycocoevalcap's."""
    targets = dict(enumerate(references))
    found = {image: [text] for image, text in enumerate(candidates)}
    statistics = bleu.statistics(candidates, references)
    corpus, per_image = Bleu(4).compute_score(targets, found, verbose=0)
    np.testing.assert_allclose(bleu.corpus_score(statistics.sum(axis=0)), corpus, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(bleu.corpus_score(statistics).T, per_image, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(
        rouge_l(candidates, references), Rouge().compute_score(targets, found)[1], 1e-12
    )
    expected = Cider().compute_score(targets, found)[1]
    np.testing.assert_allclose(cider_d(candidates, references), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "texts",
    [
        pytest.param(invent(0, 1000, 40, range(14)), id="empty texts and frequent words"),
        pytest.param(invent(1, 300, 2, range(1, 22)), id="words that repeat"),
        pytest.param(invent(2, 1, 9, [8]), id="a single image"),
        pytest.param(invent(3, 50, 9, [0, 5], (1, 1)), id="one reference each"),
        pytest.param(invent(4, 4, 9, [5], (150, 300)), id="hundreds of references"),
        pytest.param(invent(5, 60, 30, [6, 62, 63, 64, 65, 66, 130]), id="about as many words as bits"),
        pytest.param(invent(6, 3, 200, [5, 1100], (2, 3)), id="a thousand words"),
        pytest.param(invent(7, 2000, 150_000, range(8, 16), (3, 3)), id="more words than 16 bits count"),
        pytest.param(invent(8, 200, 5, range(6), space="  "), id="two spaces between words"),
        pytest.param(invent(9, 200, 5, range(6), space="\xa0"), id="no-break spaces, as in fractions"),
        pytest.param((["a b", ""], [["a b", " "], ["", "b"]]), id="nothing but spaces"),
        pytest.param((["a " * 19 + "a", "b", ""], [["a " * 17, "a"], ["b"], ["c"]]), id="one word often"),
        pytest.param((["a b c d"] * 5, [["a b c d", "a b c e"]] * 5), id="all images alike"),
    ],
)
def test_every_value_equals_pycocoevalcaps(texts):
    check(*texts)


def test_values_of_published_captions_equal_pycocoevalcaps(real_data: Path):
    captions = json.loads((real_data / "published_results" / "karpathy_test_results.json").read_text())[:1000]
    references: dict[int, list[str]] = {}
    for note in json.loads((real_data / "coco_karpathy" / "captions_test5k.json").read_text())["annotations"]:
        references.setdefault(note["image_id"], []).append(" ".join(note["caption"].lower().split()))
    check([each["caption"] for each in captions], [references[each["image_id"]] for each in captions])


def test_where_pycocoevalcap_has_no_value_ours_is_zero():
    assert cider_d(["a dog", ""], [["", " "], [""]]).tolist() == [0, 0]
    assert cider_d([], []).shape == rouge_l([], []).shape == (0,)
    assert bleu.corpus_score(bleu.statistics([], []).sum(axis=0)) == pytest.approx(np.zeros(4), abs=1e-15)


def test_bleu_of_a_bootstrap_sample_needs_the_sums_alone():
    candidates, references = invent(10, 100, 20, range(3, 12))
    drawn = np.random.default_rng(0).integers(0, 100, (3, 100))
    values = bleu.corpus_score(bleu.statistics(candidates, references)[drawn].sum(axis=1))
    for rows, value in zip(drawn, values, strict=True):
        targets = {place: references[row] for place, row in enumerate(rows)}
        found = {place: [candidates[row]] for place, row in enumerate(rows)}
        assert value == pytest.approx(Bleu(4).compute_score(targets, found, verbose=0)[0], rel=1e-12)


@pytest.mark.parametrize("value", [bleu.statistics, rouge_l, cider_d])
def test_an_image_without_a_reference_or_a_candidate_is_refused(value):
    with pytest.raises(ValueError, match="image 1 in order has no reference"):
        value(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match="1 candidates for 2 images"):
        value(["a"], [["a"], ["b"]])


def sampled(seed, images=200, captions=300):
    """Return references, and captions of some of their images: some cut, some empty, some of unseen words."""
    dice = random.Random(seed)
    references = [
        [
            [*(dice.randrange(3, 60) for _ in range(dice.choice([3, 9, 12, 70]))), END]
            for _ in range(dice.randint(1, 7))
        ]
        for _ in range(images)
    ]
    of = [dice.randrange(images) for _ in range(captions)]
    written = []
    for image in of:
        caption = list(dice.choice(references[image]))
        for _ in range(dice.randint(0, 5)):
            caption[dice.randrange(len(caption))] = dice.choice([4, dice.randrange(100), 70_000])
        written.append(caption[: dice.choice([None, None, -1, 3, 0])])
    return references, of, written


def test_the_reward_equals_a_plain_implementation():
    references, images, captions = sampled(0)
    found = CiderDReward(references)(images, captions)
    np.testing.assert_allclose(
        found, PlainCiderD(references)(np.array(images), captions), rtol=1e-12, atol=1e-14
    )


def test_the_reward_of_a_caption_does_not_depend_on_the_others():
    references, images, captions = sampled(1)
    reward = CiderDReward(references)
    together = reward(images, captions)
    alone = [reward([image], [caption])[0] for image, caption in zip(images, captions, strict=True)]
    np.testing.assert_allclose(together, alone, rtol=1e-13)
    np.testing.assert_allclose(reward(images[::-1], captions[::-1])[::-1], together, rtol=1e-13)


def test_the_end_token_is_rewarded():
    references = [[[5, 6, 7, END]], [[8, 9, END]], [[5, 6, 8, END]]]
    whole, cut, dangling = CiderDReward(references)([0, 0, 0], [[5, 6, 7, END], [5, 6, 7], [5, 6, 7, 5]])
    assert whole == pytest.approx(10 * 4 / 4)
    assert whole > cut > dangling


def test_references_without_the_end_token_are_refused():
    with pytest.raises(ValueError, match="references end with different tokens"):
        CiderDReward([[[5, 6, END]], [[5, 7]]])


def test_each_caption_needs_an_image():
    with pytest.raises(ValueError, match="1 captions of 2 images"):
        CiderDReward([[[5, END]]])([0, 0], [[5, END]])


# The usual scorer of self-critical training stores each n-gram of a caption forever.
def test_captions_with_new_words_take_no_memory():
    references, images, captions = sampled(2, images=20, captions=40)
    reward = CiderDReward(references)
    dice = np.random.default_rng(0)
    sizes = []
    tracemalloc.start()
    for _ in range(8):
        reward(images, [dice.integers(0, 2**31, len(caption)).tolist() for caption in captions])
        sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert max(sizes[3:]) < sizes[2] + 10_000
