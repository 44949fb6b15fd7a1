import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from captionscale.cli import main
from captionscale.errors import UserError
from captionscale.score import Receipt, score
from captionscale.score.metric import ComputedMetric
from captionscale.score.metrics import METRICS, measure
from captionscale.score.receipt import FORMAT, ImageResults, _hash, references_sha256
from captionscale.score.results import read_results
from captionscale.tools.score_file import score_file

N_GRAMS = ["BLEU-1", "BLEU-4", "ROUGE-L", "CIDEr-D"]
CAPTIONS = {
    7: "A dog runs over the grass.",
    3: "ein Hündchen \U0001f600 \ud83d\u2028 läuft",
    5: "",
    4: "two cats asleep on a",
}
REFERENCES = {
    7: ["a dog runs on grass", "The dog is running."],
    3: ["a small dog", "ein Hündchen"],
    5: ["a bowl of fruit"],
    4: ["Two cats sleeping on a sofa", "cats", "two cats on a couch"],
}


@pytest.fixture(scope="module")
def receipt() -> Receipt:
    return score(
        CAPTIONS,
        REFERENCES,
        N_GRAMS,
        provenance={"search": {"beam": 3, "length_penalty": 0.7}, "end_token_rewarded": False},
        # A class derived from str.
        hardware={"torch": torch.torch_version.TorchVersion("2.11.0")},
    )


@pytest.fixture
def written(receipt: Receipt, tmp_path: Path) -> Path:
    receipt.write(tmp_path / "new" / "receipt.json")
    return tmp_path / "new" / "receipt.json"


def test_reading_returns_what_was_written(receipt: Receipt, written: Path) -> None:
    again = Receipt.read(written)
    assert again.sha256 == receipt.sha256
    for name in (
        "scores",
        "intervals",
        "diagnostics",
        "counts",
        "hashes",
        "signature",
        "provenance",
        "notes",
        "environment",
    ):
        assert getattr(again, name) == getattr(receipt, name)
    assert again.images.ids == [3, 4, 5, 7]
    assert again.images.captions == [CAPTIONS[image_id] for image_id in again.images.ids]
    for kept, known in (
        (again.images.scores, receipt.images.scores),
        (again.images.statistics, receipt.images.statistics),
    ):
        assert kept.keys() == known.keys()
        for name, values in known.items():
            np.testing.assert_array_equal(kept[name], values)


def test_counts_notes_and_signature(receipt: Receipt) -> None:
    assert receipt.counts == {"images": 4, "captions": 4, "empty_captions": 1, "words": 14, "references": 8}
    assert receipt.notes == ["1 of 4 captions are empty"]
    parts = receipt.signature.split("|")
    assert [part.split()[0] for part in parts] == [
        *("references", "pycocoevalcap", "ptb", "bleu", "rouge-l", "cider-d"),
        *("captionscale", "beam", "length-penalty", "end"),
    ]
    assert parts[0] == f"references {references_sha256(REFERENCES)[:12]} (4 images)"
    # sha256sum of the jar that pycocoevalcap 1.2 carries.
    assert parts[1] == f"pycocoevalcap {version('pycocoevalcap')}"
    assert parts[2] == "ptb stanford-corenlp-3.4.1 2fcb91bb"
    assert parts[-3:] == ["beam 3", "length-penalty 0.7", "end not rewarded"]
    assert list(receipt.metric_signature.values()) == parts[:6]
    for metric, (low, high) in receipt.intervals.items():
        assert 0 <= low <= receipt.scores[metric] <= high


def test_the_same_call_gives_the_same_receipt_except_for_the_environment(
    receipt: Receipt, tmp_path: Path
) -> None:
    results, references = tmp_path / "results.json", tmp_path / "references.json"
    results.write_text(json.dumps([{"image_id": key, "caption": text} for key, text in CAPTIONS.items()]))
    notes = [(image_id, text) for image_id, texts in REFERENCES.items() for text in texts]
    document = {
        "images": [{"id": image_id, "file_name": f"{image_id}.jpg"} for image_id in REFERENCES],
        "annotations": [{"image_id": image_id, "caption": text} for image_id, text in notes],
    }
    references.write_text(json.dumps(document))

    def measure(captions: dict[int, str], references: dict[int, list[str]], _: object) -> object:
        from captionscale.score.metrics import measure

        return measure(captions, references, N_GRAMS)

    trees = []
    for name in ("one.json", "other.json"):
        score_file(results, references, tmp_path / name, measure)
        trees.append(json.loads((tmp_path / name).read_text()))
    first, second = ({key: tree[key] for key in tree if key != "environment"} for tree in trees)
    assert first == second
    assert first["scores"] == receipt.scores
    # In another order, and with other white space in the references, it is the same too.
    shuffled = {image_id: [f" {text}\n" for text in REFERENCES[image_id][::-1]] for image_id in (5, 3, 7, 4)}
    again = score(CAPTIONS, shuffled, N_GRAMS, provenance=receipt.provenance)
    assert (again.signature, again.hashes) == (receipt.signature, receipt.hashes)
    assert again.scores == pytest.approx(receipt.scores, rel=1e-12)


def test_image_ids_may_be_file_names(receipt: Receipt) -> None:
    captions = {f"{image_id}.jpg": text for image_id, text in CAPTIONS.items()}
    references = {f"{image_id}.jpg": texts for image_id, texts in REFERENCES.items()}
    named = score(captions, references, N_GRAMS)
    assert named.scores == receipt.scores
    assert named.images.ids == ["3.jpg", "4.jpg", "5.jpg", "7.jpg"]
    with pytest.raises(UserError, match=r"image '4\.jpg' has only references"):
        score({key: text for key, text in captions.items() if key != "4.jpg"}, references, N_GRAMS)


def test_a_computed_metric_is_scored_like_the_others() -> None:
    extra = ComputedMetric("CLIPScore", [0.5, 0.7, 0.0, 0.6], "clipscore open_clip-2 ViT")
    found = score(CAPTIONS, REFERENCES, ["BLEU-1", extra])
    assert found.scores["CLIPScore"] == pytest.approx(0.45)
    assert found.metric_signature["clipscore"] == "clipscore open_clip-2 ViT"
    low, high = found.intervals["CLIPScore"]
    assert 0 <= low < 0.45 < high <= 0.7


def change(**changes: object) -> Callable[[bytes], bytes]:
    return lambda data: json.dumps(json.loads(data) | changes).encode()


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda data: data[:-100], r"no receipt, or a damaged one \("),
        (lambda data: data[:0], "no receipt, or a damaged one"),
        (lambda _: b"\xff\xfe\x00", "no receipt, or a damaged one"),
        (lambda _: b"[1, 2]", "it has no key 'format'"),
        (lambda _: b'{"format": 3}', "no receipt, or a damaged one"),
        (lambda _: b"[" * 100_000, "no receipt, or a damaged one"),
        (change(format=1), "a receipt of another format, expected 3; score the captions again"),
        (change(scores={"BLEU-1": 0.9}), "was changed after it was written"),
        (change(surplus=1), "was changed after it was written"),
        (lambda data: data.replace(b"over the grass", b"over the Grass"), "was changed after it was written"),
        (change(sha256=None), "was changed after it was written"),
    ],
)
def test_a_truncated_edited_or_foreign_receipt_is_refused(
    written: Path, damage: Callable[[bytes], bytes], found: str
) -> None:
    written.write_bytes(damage(written.read_bytes()))
    with pytest.raises(UserError, match=found):
        Receipt.read(written)


def in_images(**changes: object) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tree: {"images": tree["images"] | changes}


VALUES = {"BLEU-1": 0.9, "BLEU-4": 0.9, "ROUGE-L": 0.9, "CIDEr-D": 0.9}


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        (lambda _: {"scores": [1, 2]}, "scores: Expected `object`, got `array`"),
        (lambda _: {"scores": VALUES | {"BLEU-1": "0.9"}}, "Expected `float`, got `str`"),
        (lambda _: {"scores": VALUES | {"BLEU-1": 10**400}}, "out of range"),
        (lambda _: {"scores": VALUES | {"BLEU-1": float("nan")}}, "not JSON compliant"),
        (
            lambda _: {"scores": {"BLEU-1": 0.9}},
            r"intervals and scores are not of the same metrics \(BLEU-4\)",
        ),
        (lambda _: {"intervals": {}}, "intervals and scores are not of the same"),
        (lambda _: {"scores": {}, "intervals": {}}, "it has no scores"),
        (lambda _: {"intervals": {metric: [0.1] for metric in VALUES}}, "Expected `array` of length 2"),
        (
            lambda tree: {"diagnostics": {"captions": tree["diagnostics"]["captions"]}},
            "missing required field `references`",
        ),
        (lambda tree: {"diagnostics": tree["diagnostics"] | {"captions": {}}}, "missing required field"),
        (lambda _: {"hashes": {}}, "hashes are without captions"),
        (lambda _: {"hashes": {"captions": "ab", "references": ["ab"]}}, "Expected `str`, got `array`"),
        (lambda _: {"counts": {"images": 4}}, "counts are without captions"),
        (lambda _: {"signature": None}, "Expected `str`, got `null`"),
        (lambda _: {"provenance": []}, "Expected `object`"),
        (lambda _: {"notes": [1]}, "Expected `str`"),
        (lambda _: {"surplus": 1}, "unknown field `surplus`"),
        (lambda _: {"images": []}, "Expected `object`"),
        (in_images(ids=[]), "ids are not all numbers, nor all texts"),
        (in_images(ids=[1, 2, 3, "4"]), "ids are not all numbers, nor all texts"),
        (in_images(ids=[1, 2, 3]), "images has not 3 of each thing"),
        (in_images(scores={}), "images.scores and scores are not of the same metrics"),
        (in_images(scores={metric: [0.1] for metric in VALUES}), "images has not 4 of each thing"),
        (in_images(statistics={}), r"images.statistics and scores .* \(BLEU\)"),
        (
            in_images(statistics=dict.fromkeys(("BLEU", "ROUGE-L", "CIDEr-D"), [[1.0, 1.0]] * 4)),
            "images.statistics.BLEU has rows of another length",
        ),
    ],
)
def test_a_receipt_with_invalid_parts_is_refused(
    written: Path, changes: Callable[[dict[str, Any]], dict[str, Any]], found: str
) -> None:
    # Its hash fits, but readers would fail later, such as at a list of scores or an absent interval.
    tree = json.loads(written.read_text())
    tree |= changes(tree)
    tree["sha256"] = _spoilt_hash(
        {key: tree[key] for key in tree if key not in ("sha256", "environment", "format")}
    )
    written.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=f"no receipt, or a damaged one .*{found}.*; score the captions"):
        Receipt.read(written)


def _spoilt_hash(tree: dict[str, Any]) -> str:
    try:
        return _hash({"format": FORMAT, **tree})
    except ValueError:
        return ""


def test_notes_and_signature_follow_implementation_and_provenance() -> None:
    theirs = partial(measure, reference_implementation=True)
    facts = [{}, {"search": {"beam": 3}}, {"search": None, "end_token_rewarded": True}, {"search": {}}]
    signed = []
    for provenance in facts:
        found = score(CAPTIONS, REFERENCES, ["BLEU-1"], measure=theirs, provenance=provenance)
        assert "measured by pycocoevalcap's own classes" in found.notes
        signed.append(found.signature.partition("|captionscale ")[2].split("|")[1:])
    assert signed == [[], ["beam 3"], ["end rewarded"], []]
    # The values are equal, so they are ranked together.
    ours = score(CAPTIONS, REFERENCES, ["BLEU-1"])
    assert (ours.metric_signature, ours.notes) == (found.metric_signature, ["1 of 4 captions are empty"])


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b'[{"image_id": 1, "caption": "a d', r"no COCO results \(Unterminated string"),
        (b"\xff\xfe[]", "no COCO results .*can't decode byte 0xff"),
        (b'{"images": []}', "line 0 of the list is {'images': "),
        (b'[{"image_id": "1", "caption": "a dog"}]', "line 0 of the list is"),
        (b'[{"image_id": true, "caption": "a dog"}]', "line 0 of the list is"),
        (b'[{"image_id": 1, "caption": null}]', "line 0 of the list is"),
        (b"[" * 100_000, "no COCO results"),
    ],
)
def test_invalid_results_are_refused_with_the_expected_format(
    content: bytes, found: str, tmp_path: Path
) -> None:
    path = tmp_path / "results.json"
    path.write_bytes(content)
    with pytest.raises(
        UserError, match=rf"{found}.*; expected a JSON list of .*; write it again in that form"
    ):
        read_results(path)
    # The mark that some editors put before a text is no fault.
    path.write_bytes(b'\xef\xbb\xbf[{"image_id": 1, "caption": "a dog"}]')
    assert read_results(path) == {1: "a dog"}


def test_formatting_and_environment_do_not_change_the_hash(receipt: Receipt, written: Path) -> None:
    tree = json.loads(written.read_text()) | {"environment": {}}
    written.write_text(json.dumps(dict(sorted(tree.items())), indent=2, ensure_ascii=True))
    assert Receipt.read(written).sha256 == receipt.sha256


def test_a_folder_or_a_missing_file_is_refused(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path, "no receipt, or a damaged one"),
        (tmp_path / "none.json", "does not exist, expected a receipt"),
    ):
        with pytest.raises(UserError, match=message):
            Receipt.read(path)
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        main(["compare", str(tmp_path / "file"), str(tmp_path / "none.json")])


def test_the_receipt_of_5000_images_is_below_3_mb(receipt: Receipt, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    images = ImageResults(
        ids=list(range(400_000, 405_000)),
        captions=["a man riding a wave on top of a surfboard in the ocean"] * 5000,
        scores={metric: random.random(5000) for metric in METRICS},
        statistics={
            "BLEU": random.integers(20, size=(5000, 10)).astype(float),
            "METEOR": random.integers(20, size=(5000, 23)).astype(float),
            **{
                metric: np.stack([random.random(5000), np.ones(5000)], 1) for metric in ("ROUGE-L", "CIDEr-D")
            },
        },
    )
    values = dict.fromkeys(METRICS, 0.5)
    bounds = dict.fromkeys(METRICS, (0.4, 0.6))
    msgspec.structs.replace(receipt, images=images, scores=values, intervals=bounds).write(
        tmp_path / "receipt.json"
    )
    assert (tmp_path / "receipt.json").stat().st_size < 3_000_000
    np.testing.assert_array_equal(
        Receipt.read(tmp_path / "receipt.json").images.scores["METEOR"], images.scores["METEOR"]
    )


def test_references_with_other_scores_have_another_hash() -> None:
    own = references_sha256(REFERENCES)
    for other in (
        {**REFERENCES, 5: ["a bowl of fruits"]},
        {**REFERENCES, 5: ["a bowl of fruit", ""]},
        {**REFERENCES, 5: ["a bowl of fruit"] * 2},
        {**REFERENCES, 6: ["a bowl of fruit"]},
        {**REFERENCES, 7: REFERENCES[4], 4: REFERENCES[7]},
    ):
        assert references_sha256(other) != own


@pytest.mark.usefixtures("started")
def test_scores_need_no_torch() -> None:
    program = (
        "import sys; from captionscale.score import score\n"
        "score({1: 'a dog'}, {1: ['a dog']}, ['BLEU-1'])\n"
        "print({name for name in ('torch', 'torchvision', 'accelerate') if name in sys.modules})"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "set()\n"


WRONG = {
    '({1: "a dog"}, {"1": ["a dog"]}, ["BLEU-1"])': "image ids are int and str",
    '({1: None}, {1: ["a dog"]}, ["BLEU-1"])': "the caption of image 1 is None, expected a str",
    '({1: "a dog"}, {1: "a dog"}, ["BLEU-1"])': "a str instead of a list",
    '({1: "a dog"}, {1: [None]}, ["BLEU-1"])': "the references of image 1 are [None], expected a list of str",
    '({1: "a dog"}, {1: ["a dog"]}, [])': "expected a list of some of BLEU-1",
    '({1: "a dog"}, {1: ["a dog"]}, "BLEU-1")': "expected a list of some of BLEU-1",
    '({1: "a dog"}, {1: ["dog " * 5001]}, ["BLEU-1"])': "image 1 has 5,001 words, expected at most 5,000",
    '({int64(1): "a dog"}, {int64(1): ["a dog"]}, ["BLEU-1"])': "image ids are int64, expected all int",
}


def test_invalid_arguments_are_refused() -> None:
    # Elsewhere: here types are checked at each call.
    code = f"""
from numpy import int64
from captionscale.errors import UserError
from captionscale.score import score
for case in {list(WRONG)!r}:
    try:
        score(*eval(case))
    except UserError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for error, expected in zip(done.stdout.splitlines(), WRONG.values(), strict=True):
        assert expected in error


def test_the_receipt_never_overwrites_an_input(tmp_path: Path) -> None:
    results, references = tmp_path / "results.json", tmp_path / "captions.json"
    results.write_text('[{"image_id": 1, "caption": "a dog"}]', encoding="utf-8")
    tree = {"images": [{"id": 1}], "annotations": [{"id": 1, "image_id": 1, "caption": "a dog"}]}
    references.write_text(json.dumps(tree), encoding="utf-8")
    before = results.read_bytes()
    with pytest.raises(UserError, match="is an input file"):
        score_file(results, references, results, measure)
    assert results.read_bytes() == before


def test_an_unwritable_output_is_refused_before_scoring(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path, tmp_path / "file" / "receipt.json"):
        with pytest.raises(UserError, match=r"is a folder|cannot be written \(Not a directory\)"):
            score_file(tmp_path / "none.json", tmp_path / "none.json", out, measure)
