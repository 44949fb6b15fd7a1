import gzip
import os
import random
import re
import subprocess
import sys
import time
import tracemalloc
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from pathlib import Path
from threading import Event

import numpy as np
import pytest

from captionscale.errors import UserError
from captionscale.score import bleu, ciderd, java, meteor, paraphrases, rouge
from captionscale.score.metrics import METRICS, Evaluator, measure
from captionscale.score.tokenizer import tokenize

pytestmark = pytest.mark.long

# Words and phrases in METEOR's table, ones that METEOR splits in its own way, and others.
PIECES = [
    *("in front of", "next to", "a lot of", "a man", "people", "the u.s.", "u.s.a.", "u.s. 3.5 percent", "%"),
    *(
        "st.louis",
        "don't",
        "o'clock",
        "t-shirt",
        "black-and-white",
        "1/2",
        "5:30 p.m.",
        "1,000",
        "e.g.",
        "i.e.",
    ),
    *(
        "...",
        "a..b",
        "wait....",
        "dotmulti",
        '"quoted"',
        "‘so’",
        "it’s",
        "''",
        "--",
        "–",
        "(red)",
        "[x]",
        "&amp;",
    ),
    *("$5", "50 %", "mr. smith", "no. 5", "cannot", "gonna", "photograph", "picture", "sitting on top of"),
    *(
        "is riding",
        "rides",
        "motorbike",
        "bicycle",
        "bike",
        "crêpe",
        "ÎLE",
        "İstanbul",
        "\u212a",
        "ß",
        "naïve",
    ),
    *("日本語", "犬", "מתחת לשולחן", "كلب كبير", "😀", "\U0001f469\u200d\U0001f467", "\U0001f1ee\U0001f1f9"),
    *(
        "\u200f",
        "\u00a0",
        "\u2003",
        "\u2028",
        "\u2029",
        "\x85",
        "\v",
        "\f",
        "\r",
        "\n",
        "\r\n",
        "\x1c",
        "\x00",
    ),
    *(
        "\x1b",
        "|||",
        "||||||",
        "a ||| b",
        "|",
        "\ufeff",
        "\ud83d",
        "-LRB-",
        "SCORE",
        "EVAL ||| 1.0",
        "000 deaths",
    ),
]
WORDS = "a dog cat runs over the wet grass of large park two men are standing near an old train"


def _random_texts(count, seed):
    chance = random.Random(seed)
    texts = []
    for number in range(count):
        pool = WORDS.split() + PIECES if number % 3 else PIECES
        words = chance.choices(pool, k=chance.choice([0, 1, 3, 8, 12, 20]))
        texts.append(chance.choice([" ", " ", " ", "", ", "]).join(words))
    return [*texts[:-2], "", "a very long day on the beach " * 40]


@pytest.fixture(scope="module")
def random_captions():
    captions = dict(enumerate(_random_texts(300, seed=1)))
    others = _random_texts(3 * len(captions), seed=2)
    references = {image: others[3 * image : 3 * image + 1 + image % 3] for image in captions}
    # Some repeat a reference: perfect matches are counted differently.
    for image in range(0, len(captions), 7):
        references[image].append(captions[image] + " ." * (image % 2))
    return captions, references


@pytest.fixture(scope="module")
def evaluator():
    with Evaluator(workers=2) as evaluator:
        yield evaluator


@pytest.fixture(scope="module")
def table(random_captions):
    """The part of the paraphrase table for all captions next to the random references."""
    references = [text for group in random_captions[1].values() for text in group]
    return paraphrases.filter_table(tokenize(references), None)


@pytest.fixture
def filtered(table, monkeypatch):
    """JVMs take a table that is filtered already."""
    monkeypatch.setattr(paraphrases, "filter_table", lambda *_: table)


@pytest.fixture(scope="module")
def warm(random_captions, evaluator, table):
    """The scores of the random captions, by JVMs that stay warm."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paraphrases, "filter_table", lambda *_: table)
        return evaluator.measure(*random_captions, ["METEOR"])


def test_a_filtered_table_and_several_jvms_give_the_same_scores_as_one_with_the_whole_table(
    random_captions, evaluator, warm
):
    captions, references = random_captions
    assert len(evaluator._meteor._jvms) == 2
    once = measure(captions, references, ["METEOR"])
    whole = measure(captions, references, ["METEOR"], reference_implementation=True)
    assert once.per_image == warm.per_image
    # The JVM adds the same numbers up in another order.
    assert once.per_image["METEOR"] == pytest.approx(whole.per_image["METEOR"], abs=1e-12)
    assert once.values == warm.values == whole.values
    assert (once.statistics["METEOR"] == whole.statistics["METEOR"]).all()
    # Paraphrases did match.
    assert (whole.statistics["METEOR"][:, 16:20] > 0).any(axis=1).sum() > 15
    score = METRICS["METEOR"].corpus_score
    assert score(whole.statistics["METEOR"]) == pytest.approx(whole.per_image["METEOR"], abs=1e-12)
    assert score(whole.statistics["METEOR"].sum(0)) == pytest.approx(whole.values["METEOR"], abs=1e-12)


def test_scores_do_not_depend_on_order_ids_or_the_batch(random_captions, evaluator, warm):
    captions, references = random_captions
    order = random.Random(3).sample(list(captions), len(captions))
    # Other ids: the images are dealt to other JVMs, in another order.
    ids = {image: 10_000 - place for place, image in enumerate(order)}
    moved = evaluator.measure(
        {ids[image]: captions[image] for image in order},
        {ids[image]: references[image] for image in reversed(order)},
        ["METEOR"],
    )
    per_image = dict(zip(moved.image_ids, moved.per_image["METEOR"], strict=True))
    assert [per_image[ids[image]] for image in captions] == warm.per_image["METEOR"]
    texts = tokenize([text for image in order[:100] for text in (captions[image], *references[image])])
    for image in order[:100]:
        caption, *group = (texts.pop(0) for _ in range(1 + len(references[image])))
        [alone] = evaluator._meteor.statistics([caption], [group])
        assert alone.tolist() == warm.statistics["METEOR"][image].tolist()


@pytest.fixture(scope="module")
def many_captions():
    """Candidates and their references, tokenized."""
    texts = tokenize(_random_texts(1000, seed=5))
    return texts[:330], [texts[330 + 2 * place :][: 1 + place % 3] for place in range(330)]


def test_bleu_and_rouge_l_do_not_depend_on_order_or_the_batch(many_captions):
    candidates, references = many_captions
    order = random.Random(6).sample(range(len(candidates)), len(candidates))
    shuffled = [candidates[place] for place in order], [references[place] for place in order]
    for compute in (bleu.statistics, rouge.rouge_l):
        batch = compute(candidates, references)
        assert (compute(*shuffled) == batch[order]).all()
        alone = [compute([caption], [group]) for caption, group in zip(candidates, references, strict=True)]
        assert (np.concatenate(alone) == batch).all()


def test_cider_d_does_not_depend_on_order_or_the_batch(many_captions):
    # Alone against all references, whose document frequencies are part of the metric.
    ids = defaultdict(count().__next__)

    def ended(text):
        return [ids[word] for word in [*text.split(), "END"]]

    candidates, references = many_captions
    reward = ciderd.CiderDReward([[ended(text) for text in group] for group in references])
    texts = [ended(text) for text in candidates]
    batch = reward(range(len(texts)), texts)
    order = random.Random(7).sample(range(len(texts)), len(texts))
    # A sum of floats depends on the number of zeros between them; receipts keep 10 digits.
    close = partial(pytest.approx, rel=1e-12, abs=1e-13)
    assert reward(order, [texts[place] for place in order]) == close(batch[order])
    assert [reward([place], [text])[0] for place, text in enumerate(texts)] == close(batch)
    words = [f"{text} END" for text in candidates], [[f"{text} END" for text in each] for each in references]
    assert ciderd.cider_d(*words) == close(batch)
    shuffled = ([part[place] for place in order] for part in (candidates, references))
    assert ciderd.cider_d(*shuffled) == close(ciderd.cider_d(candidates, references)[order])
    assert (batch > 0).sum() > 100


@pytest.mark.usefixtures("filtered")
def test_close_during_the_start_lasts_until_open(monkeypatch):
    jvms, before = meteor.Meteor(workers=1, once=True), set(_java_children(os.getpid()))
    filter_table, started, closed = paraphrases.filter_table, Event(), Event()

    def wait_and_filter(*arguments):
        started.set()
        assert closed.wait(600)
        return filter_table(*arguments)

    monkeypatch.setattr(paraphrases, "filter_table", wait_and_filter)
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(jvms.statistics, ["a dog"], [["a dog runs"]])
        assert started.wait(600)
        jvms.close()
        closed.set()
        with pytest.raises(UserError, match="closed while it started"):
            waiting.result(timeout=600)
    assert not jvms._jvms
    assert set(_java_children(os.getpid())) <= before
    with pytest.raises(UserError, match="closed while it started"):
        jvms.statistics(["a dog"], [["a dog"]])
    jvms.open()
    try:
        assert jvms.corpus_value(jvms.statistics(["a dog"], [["a dog"]])) == pytest.approx(1.0)
    finally:
        jvms.close()


def test_each_text_is_tokenized_independently_of_the_others(random_captions):
    captions, references = random_captions
    texts = [*captions.values(), *(text for group in references.values() for text in group)]
    together = tokenize(texts)
    order = random.Random(4).sample(range(len(texts)), len(texts))
    assert tokenize([texts[place] for place in order]) == [together[place] for place in order]
    for place in order[:2]:
        assert tokenize([texts[place]]) == [together[place]]


def contains(texts, *phrases):
    """Return whether the n-grams of texts contain phrases."""
    *_, hashes = paraphrases.hash_lines("".join(f"{phrase}\n" for phrase in phrases).encode())
    return paraphrases.PhraseIndex(texts).contains(hashes)


def test_phrases_are_split_as_by_the_normalizer():
    texts = ["the U.S. t-shirt..cost $1,000", "a dog"]
    assert contains(texts, "us", "the us t", "t shirt", "shirt cost 1 000", "a dog").all()
    assert not contains(texts, "shirtcost", "000 a", "the us t shirt cost 1 000 a", "the us ").any()


def test_matching_pairs_and_phrases_with_other_characters_are_kept():
    with gzip.open(Path(paraphrases.meteor.__file__).with_name("data") / "paraphrase-en.gz", "rt") as file:
        lines = (line.rstrip("\n") for line in file)
        entries = zip(lines, lines, lines, strict=True)
        pair = next(each[1:] for each in entries if re.fullmatch("[a-z ]+", "".join(each[1:])))
    entries = paraphrases.filter_table([f"the {pair[0]} runs"], [f"a dog {pair[1]}"])
    pairs = {tuple(entry.decode().split("\n")[1:3]) for entry in entries}
    other = {each for each in pairs if re.search(r"[^a-z0-9 ]", "".join(each))}
    assert pair in pairs
    assert len(pairs - other) < 100
    assert len(other) > 10_000
    assert paraphrases.filter_table(["a dog"], None, lambda: True) == []


def test_phrases_of_many_captions_take_little_memory():
    draw = random.Random(0)
    texts = [" ".join(f"w{draw.randrange(9000)}" for _ in range(10)) for _ in range(10_000)]
    tracemalloc.start()
    found = paraphrases.PhraseIndex(texts)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    phrases = "".join(f"{' '.join(text.split()[2:9])}\n" for text in texts)
    *_, hashes = paraphrases.hash_lines(phrases.encode())
    assert found.contains(hashes).all()
    assert peak < 50e6


@pytest.mark.usefixtures("filtered")
def test_a_dead_jvm_is_started_again_once(random_captions, evaluator, monkeypatch):
    captions, references = ({image: texts[image] for image in range(100)} for texts in random_captions)
    before = evaluator.measure(captions, references, ["METEOR"])
    for jvm in evaluator._meteor._jvms:
        jvm.process.kill()
    assert evaluator.measure(captions, references, ["METEOR"]).per_image == before.per_image

    ask = java.Jvm.query

    def kill_and_ask(self, lines, answers, **options):
        if self.name == "METEOR":
            self.process.kill()
        return ask(self, lines, answers, **options)

    monkeypatch.setattr(java.Jvm, "query", kill_and_ask)
    with pytest.raises(
        UserError, match=r"METEOR: its Java process was killed by signal 9 .* raise meteor_gb"
    ):
        evaluator.measure(captions, references, ["METEOR"])


def test_too_little_memory_names_the_option():
    with pytest.raises(UserError, match=r"meteor_gb = 0\.1, expected 0\.23 or more .* raise meteor_gb"):
        measure({1: "a dog"}, {1: ["a dog"]}, ["METEOR"], meteor_gb=0.1)


def _java_children(parent):
    children = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().rpartition(")")
        except OSError:
            continue
        if name.endswith("(java") and int(rest.split()[1]) == parent and rest.split()[0] != "Z":
            children.append(int(stat.parent.name))
    return children


def test_no_jvm_outlives_a_killed_process():
    if not Path("/proc/self/stat").exists():
        pytest.skip("needs Linux, to look for processes")
    program = """
import time
from captionscale.score import paraphrases
from captionscale.score.metrics import Evaluator
# It takes seconds, and has no part in this.
paraphrases.filter_table = lambda *_: []
images = range(600)
evaluator = Evaluator(workers=2)
evaluator.measure(dict.fromkeys(images, "a dog"), dict.fromkeys(images, ["a dog runs"]), ["METEOR"])
print("warm", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "warm\n"
        children = _java_children(process.pid)
        assert len(children) == 2
        process.kill()
    deadline = time.monotonic() + 600
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_damaged_table_is_an_error(monkeypatch, tmp_path):
    (tmp_path / "data").mkdir()
    for content, found in ((None, "No such file"), (b"no gzip", "Not a gzipped file"), (b"", "is not whole")):
        if content is not None:
            (tmp_path / "data" / "paraphrase-en.gz").write_bytes(content)
        monkeypatch.setattr(paraphrases.meteor, "__file__", str(tmp_path / "meteor.py"))
        with pytest.raises(UserError, match=found):
            paraphrases.filter_table([], None)
