"""What a score was measured with, in one line, so that only like is ranked with like."""

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pycocoevalcap.meteor import meteor
from pycocoevalcap.tokenizer import ptbtokenizer

from captionscale.config import Search
from captionscale.files import sha256_of
from captionscale.score.metrics import family
from captionscale.score.optional_metrics import OptionalMetrics
from captionscale.version import __version__

_SEARCH = {key: each.default for key, each in Search.model_fields.items() if key != "batch_size"}
_MAKING = {"captionscale", "ensemble", "end"} | {key.replace("_", "-") for key in _SEARCH}
"""Parts that say how captions were made, and not how they were measured."""


def signature(
    metrics: Sequence[str],
    references_sha256: str,
    images: int,
    optional_metrics: Sequence[OptionalMetrics],
    provenance: Mapping[str, Any],
) -> str:
    """Return parts between `|`, each of which begins with a name: first how it was measured, then how made.

    Args:
        metrics: Of `metrics.METRICS`.
        references_sha256: As `receipt.references_sha256` gives it.
        images: How many.
        optional_metrics: Figures of other metrics.
        provenance: As a receipt has it.
    """
    return "|".join([*_measured(metrics, references_sha256, images, optional_metrics), *_made(provenance)])


def metric_signature(signature: str) -> dict[str, str]:
    """Return the parts of a signature that say how it was measured, by their names.

    Examples:
        >>> metric_signature("ptb corenlp-3.4.1|bleu coco|beam 5")
        {'ptb': 'ptb corenlp-3.4.1', 'bleu': 'bleu coco'}
    """
    parts = {part.partition(" ")[0]: part for part in signature.split("|")}
    return {name: part for name, part in parts.items() if name not in _MAKING}


def _measured(
    metrics: Sequence[str], references_sha256: str, images: int, optional_metrics: Sequence[OptionalMetrics]
) -> Iterator[str]:
    yield f"references {references_sha256[:12]} ({images:,} images)"
    yield f"pycocoevalcap {version('pycocoevalcap')}"
    yield f"ptb {_named(Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR))}"
    for name in dict.fromkeys(map(family, metrics)):
        match name:
            case "METEOR":
                # Its Java program, and the table of paraphrases beside it that it loads.
                jar = Path(meteor.__file__).with_name(meteor.METEOR_JAR)
                table = sha256_of(jar.with_name("data") / "paraphrase-en.gz")
                yield f"meteor {_named(jar)} table {table[:8]}"
            case "CIDEr-D":
                yield f"cider-d n4 sigma6 df=references ({images:,} images)"
            case _:
                yield f"{name.lower()} coco"
    yield from (extra.signature for extra in optional_metrics)


def _made(provenance: Mapping[str, Any]) -> Iterator[str]:
    yield f"captionscale {__version__}"
    search = provenance.get("search")
    if isinstance(search, Mapping):
        for key, usual in _SEARCH.items():
            if key in search and (search[key] != usual or key in ("beam", "length_penalty")):
                yield f"{key.replace('_', '-')} {search[key]}"
    if isinstance(members := provenance.get("members"), list):
        yield f"ensemble {len(members)}"
    if "end_token_rewarded" in provenance:
        yield f"end {'rewarded' if provenance['end_token_rewarded'] else 'not rewarded'}"


def _named(jar: Path) -> str:
    return f"{jar.stem} {sha256_of(jar)[:8]}"
