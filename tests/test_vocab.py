import json
from pathlib import Path

import pytest

from captionscale.errors import UserError
from captionscale.vocab import END, PAD, SPECIAL_TOKENS, START, UNK, Vocabulary, build, load, split_words

CAPTIONS = ["A dog and a cat.", "a dog, running!", "The cat's T-shirt", "two dogs"]


def test_words_come_in_the_order_of_their_counts_then_of_the_alphabet() -> None:
    vocabulary = build(CAPTIONS, 1, None)
    assert vocabulary.words == (
        *SPECIAL_TOKENS,
        "a",
        "dog",
        "and",
        "cat",
        "cat's",
        "dogs",
        "running",
        "t-shirt",
        "the",
        "two",
    )


def test_the_order_of_the_captions_does_not_matter() -> None:
    assert build(CAPTIONS, 1, None) == build(reversed(CAPTIONS), 1, None)


@pytest.mark.parametrize(("least", "words"), [(1, 10), (2, 2), (3, 1)])
def test_a_word_is_in_if_it_is_frequent_enough(least, words) -> None:
    assert len(build(CAPTIONS, least, None)) == len(SPECIAL_TOKENS) + words


def test_the_most_frequent_words_stay_when_there_are_too_many() -> None:
    assert build(CAPTIONS, 1, 2).words == (*SPECIAL_TOKENS, "a", "dog")
    assert build(CAPTIONS, 1, 100) == build(CAPTIONS, 1, None)


def test_captions_without_a_frequent_word_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"^vocabulary: none of 10 words .* data\.min_count = 4 times; lower data\.min_"
    ):
        build(CAPTIONS, 4, None)


@pytest.mark.parametrize("caption", [*CAPTIONS, "", "...", "Une crêpe — au café 😀"])
def test_decoding_gives_back_the_words_of_what_was_encoded(caption) -> None:
    vocabulary = build([*CAPTIONS, "une crêpe au café"], 1, None)
    tokens = vocabulary.encode(caption, 100)
    assert (tokens[0], tokens[-1]) == (START, END)
    assert vocabulary.decode(tokens) == " ".join(split_words(caption))
    assert vocabulary.decode([*tokens, PAD, PAD, START]) == vocabulary.decode(tokens)


def test_a_word_that_is_not_in_is_unknown() -> None:
    vocabulary = build(CAPTIONS, 1, None)
    assert vocabulary.encode("a zebra", 100) == [START, vocabulary.words.index("a"), UNK, END]


def test_a_long_caption_is_cut_and_still_ends() -> None:
    tokens = build(CAPTIONS, 1, None).encode("a dog " * 50, 7)
    assert len(tokens) == 1 + 7 + 1
    assert tokens[-1] == END


def test_special_tokens_cannot_be_written_in_a_caption() -> None:
    tokens = build(CAPTIONS, 1, None).encode("<end> a <pad>", 100)
    assert tokens[1:-1].count(END) == tokens.count(PAD) == 0


def test_a_saved_vocabulary_is_the_same_when_read(tmp_path: Path) -> None:
    vocabulary = build([*CAPTIONS, "une crêpe"], 1, None)
    vocabulary.save(tmp_path / "vocab.json")
    assert load(tmp_path / "vocab.json") == vocabulary
    assert load(tmp_path / "vocab.json").sha256 == vocabulary.sha256


def test_the_hash_depends_on_words_and_order() -> None:
    hashes = {Vocabulary(words).sha256 for words in [("a", "b"), ("b", "a"), ("a", "b", "c"), ("ab",)]}
    assert len(hashes) == 4


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"format": 1}', '{"words": 5}', b"\xff\xfe"])
def test_what_is_no_vocabulary_is_refused(tmp_path: Path, content) -> None:
    path = tmp_path / "vocab.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(
        UserError, match=r"no vocabulary .* written by captionscale train, take it from the run's"
    ):
        load(path)


def test_the_file_is_plain_json(tmp_path: Path) -> None:
    build(["crêpe"], 1, None).save(tmp_path / "vocab.json")
    assert "crêpe" in (tmp_path / "vocab.json").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8")) == {
        "format": 1,
        "words": [*SPECIAL_TOKENS, "crêpe"],
    }
