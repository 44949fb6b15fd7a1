"""Scores that others published, each with its source: context for ours, never ranked with them."""

from functools import cache
from pathlib import Path

import msgspec

EVIDENCE = {
    "V": "read in the named repository or issue",
    "V2": "seen in a secondary transcription of the named paper, the paper itself not checked",
}
"""What a row's mark says about how its figures were found."""


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"group": "class"}):
    """What one source says about one model.

    Attributes:
        split: Key of `Published.splits`.
        group: Key of `Published.classes`: rows of different ones are no match for each other.
        model: Its name.
        encoder: And the form of its features.
        source: Key of `Published.sources`.
        evidence: Key of `EVIDENCE`.
        scores: Of each metric that the source gives, times 100.
        loss: Trained by what, if the source says so.
        beam: Decoded by what, if the source says so.
        note: What a reader must know.
        incomparable: Metrics whose figure is not what its name says elsewhere; the note says why.
    """

    split: str
    group: str
    model: str
    encoder: str
    source: str
    evidence: str
    scores: dict[str, float]
    loss: str = ""
    beam: int | None = None
    note: str = ""
    incomparable: tuple[str, ...] = ()


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where figures are from: in words, and at which address if they are on the web."""

    citation: str
    url: str = ""


class Split(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A split that is scored on, and the hash by which a receipt tells it; empty: not known."""

    title: str
    references_sha256: str


class Published(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that `published.toml` holds."""

    classes: dict[str, str]
    splits: dict[str, Split]
    sources: dict[str, Source]
    rows: tuple[Row, ...]

    def find_split(self, references_sha256: str) -> str | None:
        """Return the key of the split that has these references."""
        keys = {split.references_sha256: key for key, split in self.splits.items()}
        return keys.get(references_sha256)

    def groups(self, split: str) -> dict[str, list[Row]]:
        """Return the rows of a split by the title of their class."""
        found = {
            title: [row for row in self.rows if (row.split, row.group) == (split, key)]
            for key, title in self.classes.items()
        }
        return {title: rows for title, rows in found.items() if rows}


@cache
def published() -> Published:
    """Return what is in `published.toml`."""
    return msgspec.toml.decode(Path(__file__).with_name("published.toml").read_bytes(), type=Published)
