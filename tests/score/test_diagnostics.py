import pytest

from captionscale.score.diagnostics import MAX_LENGTH_BIN, diagnose, table

CAPTIONS = {
    1: "A man with a",
    2: "a man with a",
    3: "",
    4: "red dog runs red dog runs",
    5: "the the cat",
    6: "Two birds sit.",
    7: "word " * 80,
    8: "a bus parked on the street",
}
REFERENCES = {image_id: ["Two birds sit", f"unused {image_id}"] for image_id in CAPTIONS}


def test_diagnostics_of_captions_and_references() -> None:
    found = diagnose(CAPTIONS, REFERENCES, train_captions=["Two birds, sit!", "a zebra"], vocabulary_size=100)
    ours, references = found["captions"], found["references"]
    assert ours["captions"] == references["captions"] == 8
    assert ours["empty"] == 1 / 8
    assert ours["dangling_endings"] == 2 / 8
    assert ours["repeated_words"] == 2 / 8  # "the the", "word word"
    assert ours["repeated_3_grams"] == 2 / 8  # "red dog runs", "word word word"
    assert ours["distinct"] == 7 / 8
    assert ours["novel"] == 7 / 8
    # a man with red dog runs the cat two birds sit word bus parked on street
    assert ours["vocabulary_size"] == 16
    assert ours["vocabulary_coverage"] == 16 / 100
    assert ours["length_mean"] == (4 + 4 + 0 + 6 + 3 + 3 + 80 + 6) / 8
    assert ours["length_histogram"] == [1, 0, 0, 2, 2, 0, 2, *[0] * (MAX_LENGTH_BIN - 7), 1]
    # The first reference of each image, so both sides have as many.
    assert references["vocabulary_size"] == 3
    assert (references["distinct"], references["novel"], references["vocabulary_coverage"]) == (
        1 / 8,
        0.0,
        None,
    )


def test_unknown_statistics_are_left_out() -> None:
    found = diagnose({1: "a dog"}, {1: ["a cat"]})
    assert found["captions"]["novel"] is found["captions"]["vocabulary_coverage"] is None
    assert not [line for line in table(found) if "novel" in line or "empty" in line]
    assert [line for line in table(diagnose({1: ""}, {1: ["a cat"]}, train_captions=[])) if "100.0%" in line]


@pytest.mark.parametrize(
    ("caption", "dangles"),
    [
        ("a man holding a.", True),
        ("A dish from", True),
        ("a bench to sit", False),
        ("", False),
        ("...", False),
    ],
)
def test_a_dangling_ending_is_found_before_punctuation(caption: str, dangles: bool) -> None:
    assert diagnose({1: caption}, {1: ["a"]})["captions"]["dangling_endings"] == float(dangles)
