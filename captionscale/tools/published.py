"""Scores that others published, each with its source: context for the board, never ranked."""

from functools import cache
from pathlib import Path

import msgspec

EVIDENCE = {
    "V": "read in the named repository or issue",
    "V2": "seen in a secondary transcription of the named paper, the paper itself not checked",
}
"""What a row's mark says about how its scores were found."""


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"group": "class"}):
    """Scores of one model from one source."""

    split: str
    """Key of `Published.splits`."""
    group: str
    """Key of `Published.classes`; rows of different classes are not comparable."""
    model: str
    encoder: str
    """Encoder and form of its features."""
    source: str
    """Key of `Published.sources`."""
    evidence: str
    """Key of `EVIDENCE`."""
    scores: dict[str, float]
    """Of each metric in the source, times 100."""
    loss: str = ""
    """Training objective, if the source names it."""
    beam: int | None = None
    note: str = ""
    incomparable: tuple[str, ...] = ()
    """Metrics whose score is not what its name means elsewhere; the note has the reason."""

    @property
    def details(self) -> str:
        """Encoder, loss and beam."""
        return " · ".join(filter(None, (self.encoder, self.loss, f"beam {self.beam}" if self.beam else "")))


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A citation, and its address if it is on the web."""

    citation: str
    url: str = ""


class Split(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A split, and the hash of its references in receipts; empty: not known."""

    title: str
    references_sha256: str


class Published(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of `published.toml`."""

    classes: dict[str, str]
    splits: dict[str, Split]
    sources: dict[str, Source]
    rows: tuple[Row, ...]

    def find_split(self, references_sha256: str) -> str | None:
        """Return the key of the split with these references."""
        return next(
            (key for key, each in self.splits.items() if each.references_sha256 == references_sha256), None
        )

    def groups(self, split: str) -> dict[str, list[Row]]:
        """Return the rows of a split by the title of their class."""
        found = {
            title: [row for row in self.rows if (row.split, row.group) == (split, key)]
            for key, title in self.classes.items()
        }
        return {title: rows for title, rows in found.items() if rows}


@cache
def published() -> Published:
    """Return the content of `published.toml`."""
    return msgspec.toml.decode(Path(__file__).with_name("published.toml").read_bytes(), type=Published)
