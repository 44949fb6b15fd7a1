"""The receipt: scores with everything that they depend on, in one file."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import numpy as np
from jaxtyping import Float64

from captionscale import parsing
from captionscale.errors import UserError
from captionscale.files import MB, atomic_write, read_file
from captionscale.score.diagnostics import Diagnostics
from captionscale.score.metrics import METRICS
from captionscale.score.signature import metric_signature

FORMAT = 3
_COUNTS = ("images", "captions", "empty_captions", "words", "references")
_HASHES = ("captions", "references")

References: TypeAlias = Mapping[int, Sequence[str]] | Mapping[str, Sequence[str]]
"""One or more references for each image."""


class ImageResults(msgspec.Struct, frozen=True, eq=False, forbid_unknown_fields=True):
    """What a receipt holds of each image, in the order of `ids`."""

    ids: list[Any]
    """All int, or all str."""
    captions: list[str]
    scores: dict[str, Float64[np.ndarray, "_"]]
    """Of each metric."""
    statistics: dict[str, Float64[np.ndarray, "_ _"]]
    """Of each family of metrics: their sums over any images give the corpus values of these images."""


class Receipt(msgspec.Struct, frozen=True, eq=False, forbid_unknown_fields=True):
    """Scores, and everything that they depend on.

    Attributes:
        scores: The corpus value of each metric, 0 to 1 (CIDEr-D: 0 to 10; CLIPScore: 0 to 2.5).
        intervals: The 95 % bootstrap interval of each.
        bootstrap: How it was drawn.
        diagnostics: Statistics of the captions and of the references.
        counts: Images, captions, empty captions, words of captions, references.
        hashes: SHA-256 of captions and references, and of what generated the captions.
        signature: How everything was measured and generated, in parts joined by `|`.
        provenance: What generated the captions.
        notes: What a reader of the scores must know.
        environment: Time, host and hardware; everything else is the same wherever the command runs again.
        images: Each image's caption, scores and statistics.
    """

    scores: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    bootstrap: dict[str, Any]
    diagnostics: Diagnostics
    counts: dict[str, int]
    hashes: dict[str, str]
    signature: str
    provenance: dict[str, Any]
    notes: list[str]
    environment: dict[str, Any]
    images: ImageResults

    @property
    def metric_signature(self) -> dict[str, str]:
        """The parts of the signature on the measurement, by their first word.

        Two receipts may be ranked together if no part that both have differs.
        """
        return metric_signature(self.signature)

    @property
    def sha256(self) -> str:
        """Hash of everything but `environment`; receipts with the same hash are the same."""
        return _hash({name: value for name, value in self._to_dict().items() if name != "environment"})

    def write(self, path: Path | str) -> None:
        """Write the receipt as JSON.

        Raises:
            UserError: The file cannot be written.
        """
        tree = self._to_dict()
        images = tree.pop("images")
        # One key a line, so the head is readable.
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in tree.items()]
        lines += [f'"sha256": "{self.sha256}"', f'"images": {json.dumps(images, separators=(",", ":"))}']
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(("{\n" + ",\n".join(lines) + "\n}\n").encode())

    @staticmethod
    def read(path: Path) -> "Receipt":
        """Read a receipt, and verify that nothing but `environment` has changed since it was written.

        Raises:
            UserError: No receipt, a truncated or edited one, or one of another format.
        """
        if not path.exists():
            raise UserError(f"{path}: does not exist, expected a receipt, or a scored run; correct the path")
        try:
            tree = parsing.loads(read_file(path, 512 * MB))
            if not isinstance(tree, dict) or "format" not in tree:
                raise ValueError("it has no key 'format'")
            if tree["format"] != FORMAT:
                raise UserError(
                    f"{path}: a receipt of another format, expected {FORMAT}; score the captions again"
                )
            written = tree.pop("sha256")
            if _hash({name: value for name, value in tree.items() if name != "environment"}) != written:
                raise UserError(
                    f"{path}: was changed after it was written: its own sha256 {str(written)[:12]}... does"
                    " not match; expected the original; get it, or score the captions again"
                )
            del tree["format"]
            receipt = parsing.convert(tree, Receipt, _to_array)
            _check(receipt)
            return receipt
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}: no receipt, or a damaged one ({getattr(error, 'strerror', error)}); expected what"
                " captionscale score writes; score the captions again"
            ) from None

    def _to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, **msgspec.to_builtins(self, enc_hook=_to_builtin)}


def references_sha256(references: References) -> str:
    """Return a hash that two sets of references share if they give the same scores.

    White space and the order of an image's references, in which copies of one data set differ, are ignored.
    """
    plain = {image_id: [" ".join(text.split()) for text in texts] for image_id, texts in references.items()}
    return _hash([[image_id, sorted(plain[image_id])] for image_id in sorted(plain)])


def captions_sha256(captions: Mapping[Any, str]) -> str:
    """Return a hash of captions."""
    return _hash(sorted([image_id, caption] for image_id, caption in captions.items()))


def _check(receipt: Receipt) -> None:
    """Verify that the parts of a receipt fit each other (ValueError)."""
    images, names = receipt.images, receipt.scores.keys()
    count = len(images.ids)
    if {type(image_id) for image_id in images.ids} not in ({int}, {str}):
        raise ValueError("images.ids are not all numbers, nor all texts")
    if not names:
        raise ValueError("it has no scores")
    for place, values, required in (("counts", receipt.counts, _COUNTS), ("hashes", receipt.hashes, _HASHES)):
        if missing := [key for key in required if key not in values]:
            raise ValueError(f"{place} are without {missing[0]}")
    # A user's own metric has a family of its name.
    widths = {
        metric.family if metric else name: metric.width if metric else None
        for name, metric in ((name, METRICS.get(name)) for name in names)
    }
    for place, found, expected in (
        ("intervals", receipt.intervals, names),
        ("images.scores", images.scores, names),
        ("images.statistics", images.statistics, widths),
    ):
        if odd := set(found) ^ set(expected):
            raise ValueError(f"{place} and scores are not of the same metrics ({min(odd):.40})")
    lengths = {len(images.captions), *map(len, images.scores.values()), *map(len, images.statistics.values())}
    if lengths != {count}:
        raise ValueError(f"images has not {count} of each thing")
    for name, rows in images.statistics.items():
        if widths[name] not in (None, rows.shape[1]):
            raise ValueError(f"images.statistics.{name:.40} has rows of another length")


def _to_array(_: type, values: Any) -> Float64[np.ndarray, "..."]:
    nested = isinstance(values, list) and values and isinstance(values[0], list)
    return np.asarray(msgspec.convert(values, list[list[float]] if nested else list[float]), np.float64)


def _to_builtin(values: Any) -> Any:
    """Return arrays as lists, in which whole numbers of statistics are short, and plain str."""
    if not isinstance(values, np.ndarray):
        # Such as torch.__version__, which is of a class derived from str.
        return str(values)
    if values.ndim == 1:
        return values.tolist()
    return [[int(each) if each.is_integer() else each for each in row] for row in values.tolist()]


def _hash(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True, allow_nan=False).encode()).hexdigest()
