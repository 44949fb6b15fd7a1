import json
from pathlib import Path

import msgspec
import numpy as np
import pytest

from captionscale.cli import main
from captionscale.errors import UserError
from captionscale.score import Receipt, bleu
from captionscale.score.comparison import compare, find_receipt, p_value
from captionscale.score.diagnostics import diagnose
from captionscale.score.intervals import bootstrap_scores, interval
from captionscale.score.metrics import METRICS
from captionscale.score.receipt import ImageResults

WORDS = np.array(["a", "dog", "cat", "runs", "sits", "on", "the", "grass", "red", "ball"])
SIGNATURE = "references 91bc (400 images)|ptb corenlp 3f2a|bleu coco|cider-d n4|captionscale 0.1.0|beam 5"


def sentences(random: np.random.Generator, count: int) -> list[str]:
    return [" ".join(random.choice(WORDS, random.integers(4, 9))) for _ in range(count)]


RANDOM = np.random.default_rng(0)
REFERENCES = [sentences(RANDOM, 3) for _ in range(400)]


def receipt(captions: list[str], cider: np.ndarray, signature: str = SIGNATURE) -> Receipt:
    """A receipt of captions whose CIDEr-D is made up."""
    statistics = {
        "BLEU": bleu.statistics(captions, REFERENCES),
        "CIDEr-D": np.stack([cider, np.ones(len(cider))], axis=1),
    }
    per_image = {"BLEU-4": bleu.corpus_score(statistics["BLEU"])[:, 3], "CIDEr-D": cider}
    metrics = [METRICS[name] for name in per_image]
    scores = {metric.name: metric.corpus_value(statistics[metric.family]) for metric in metrics}
    drawn = bootstrap_scores(statistics, metrics)
    ids = list(range(len(captions)))
    return Receipt(
        scores=scores,
        intervals={metric: interval(values) for metric, values in drawn.items()},
        bootstrap={},
        diagnostics=diagnose(dict(enumerate(captions)), dict(enumerate(REFERENCES))),
        counts={
            "images": len(ids),
            "captions": len(ids),
            "empty_captions": 0,
            "words": 1,
            "references": 1200,
        },
        hashes={"captions": "ab" * 32, "references": "cd" * 32},
        signature=signature,
        provenance={},
        notes=[],
        environment={},
        images=ImageResults(ids, captions, per_image, statistics),
    )


@pytest.fixture(scope="module")
def systems() -> tuple[Receipt, Receipt]:
    """A weak system, and one that copies a reference at half of the images."""
    random = np.random.default_rng(1)
    weak = sentences(random, 400)
    strong = [
        group[0] if at % 2 else own for at, (own, group) in enumerate(zip(weak, REFERENCES, strict=True))
    ]
    cider = random.exponential(size=400)
    return receipt(weak, cider), receipt(strong, cider + np.arange(400) % 2)


def test_a_receipt_compared_with_itself_has_no_difference(systems: tuple[Receipt, Receipt]) -> None:
    found = compare(systems[0], systems[0])
    assert found.most_changed == []
    for each in found.differences:
        assert (each.p_value, each.difference, each.interval, each.tied) == (1.0, 0.0, (0.0, 0.0), 400)


def test_a_better_system_is_significantly_better_and_the_most_changed_images_are_listed(
    systems: tuple[Receipt, Receipt],
) -> None:
    found = compare(*systems, top=3)
    assert [each.metric for each in found.differences] == ["BLEU-4", "CIDEr-D"]
    for each in found.differences:
        assert each.p_value < 0.001
        assert each.interval[0] > 0
    cider = found.differences[1]
    assert cider.difference == pytest.approx(0.5)
    assert (cider.won, cider.lost, cider.tied) == (200, 0, 200)
    # Both have the same images, so only the differences vary: half are 0, half are 1.
    assert cider.interval == pytest.approx((0.5 - 1.96 * 0.5 / 20, 0.5 + 1.96 * 0.5 / 20), abs=0.003)
    assert len(found.most_changed) == 3
    for change in found.most_changed:
        at = int(change.image_id)
        assert change.difference == pytest.approx(1.0)
        assert change.captions == (systems[0].images.captions[at], REFERENCES[at][0])


def test_swapping_the_systems_swaps_the_signs(systems: tuple[Receipt, Receipt]) -> None:
    there, back = compare(*systems), compare(*reversed(systems))
    for one, other in zip(there.differences, back.differences, strict=True):
        assert (one.p_value, one.won, one.difference) == (other.p_value, other.lost, -other.difference)
        assert one.interval == pytest.approx((-other.interval[1], -other.interval[0]), abs=2e-6)


def test_p_values_of_equal_systems_are_uniform(systems: tuple[Receipt, Receipt]) -> None:
    # The system of each caption is drawn at random, so neither side is better.
    first, second = (each.images.statistics for each in systems)
    random = np.random.default_rng(2)
    found: dict[str, list[float]] = {"BLEU-4": [], "CIDEr-D": []}
    metrics = [METRICS[name] for name in found]
    for seed in range(250):
        swap = random.integers(2, size=(400, 1), dtype=bool)
        sides = [
            {family: np.where(swap == turned, first[family], second[family]) for family in first}
            for turned in (False, True)
        ]
        drawn = [bootstrap_scores(side, metrics, resamples=400, seed=seed) for side in sides]
        for metric, p in found.items():
            p.append(p_value(drawn[1][metric] - drawn[0][metric]))
    for p in found.values():
        below = [float(np.mean(np.array(p) <= level)) for level in (0.05, 0.25, 0.5, 0.75)]
        assert below == pytest.approx([0.05, 0.25, 0.5, 0.75], abs=0.09)
        assert below[0] < 0.1


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (
            {"signature": SIGNATURE.replace("91bc", "77aa")},
            "'references 91bc .*second 'references 77aa",
        ),
        (
            {"signature": SIGNATURE.replace("3f2a", "0000")},
            "'ptb corenlp 3f2a', the second 'ptb",
        ),
        ({"scores": {"SPICE": 0.2}}, "share no metric"),
    ],
)
def test_scores_with_different_measurements_are_not_compared(
    systems: tuple[Receipt, Receipt], change: dict[str, object], found: str
) -> None:
    with pytest.raises(UserError, match=found):
        compare(systems[0], msgspec.structs.replace(systems[1], **change))


def test_other_beams_and_metrics_of_one_receipt_only_are_allowed(systems: tuple[Receipt, Receipt]) -> None:
    other = systems[1].signature.replace("beam 5", "beam 1").replace("|bleu", "|spice 1.0|bleu")
    assert len(compare(systems[0], msgspec.structs.replace(systems[1], signature=other)).differences) == 2


def test_the_command_takes_files_and_run_folders(
    systems: tuple[Receipt, Receipt], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    systems[0].write(run / "scores" / "val-step-1" / "receipt.json")
    systems[1].write(tmp_path / "other.json")
    assert (
        find_receipt(run)
        == find_receipt(run / "scores" / "val-step-1")
        == run / "scores" / "val-step-1" / "receipt.json"
    )
    main(["compare", str(run), str(tmp_path / "other.json"), "--limit", "2"])
    printed = capsys.readouterr().out
    assert "400 images" in printed
    assert printed.count("\n    A: ") == printed.count("\n    B: ") == 2
    main(["compare", str(run), str(tmp_path / "other.json"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [each["metric"] for each in found["differences"]] == ["BLEU-4", "CIDEr-D"]
    systems[0].write(run / "scores" / "test-step-1" / "receipt.json")
    with pytest.raises(UserError, match=r"2 receipts, expected one; name one of scores/test-step-1/receipt"):
        find_receipt(run)
    with pytest.raises(UserError, match="no receipt, expected one; score the run first"):
        find_receipt(tmp_path / "run" / "scores")
