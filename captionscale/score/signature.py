"""What a score depends on, in one line, so that only comparable scores are ranked together."""

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from captionscale.config import Search
from captionscale.files import sha256_of
from captionscale.score.metric import Metric
from captionscale.score.tokenizer import JAR
from captionscale.version import __version__

_SEARCH = {key: each.default for key, each in Search.model_fields.items() if key != "batch_size"}
# Parts that name how the captions were generated, not how they were measured.
_GENERATION = {"captionscale", "ensemble", "end"} | {key.replace("_", "-") for key in _SEARCH}


def signature(
    metrics: Sequence[Metric], references_sha256: str, images: int, provenance: Mapping[str, Any]
) -> str:
    """Return parts joined by `|`, each with a name as its first word: measurement first, then generation.

    Args:
        metrics: All that were computed.
        references_sha256: From `receipt.references_sha256`.
        images: How many were scored.
        provenance: From the receipt.
    """
    count = f"{images:,}"
    measured = dict.fromkeys(metric.signature.replace("{images}", count) for metric in metrics)
    return "|".join(
        [
            f"references {references_sha256[:12]} ({count} images)",
            f"pycocoevalcap {version('pycocoevalcap')}",
            f"ptb {JAR.stem} {sha256_of(JAR)[:8]}",
            *(part.replace("|", " ") for part in measured),
            *_generated(provenance),
        ]
    )


def metric_signature(signature: str) -> dict[str, str]:
    """Return the parts of a signature on the measurement, by name.

    Examples:
        >>> metric_signature("ptb corenlp-3.4.1|bleu coco|beam 5")
        {'ptb': 'ptb corenlp-3.4.1', 'bleu': 'bleu coco'}
    """
    parts = {part.partition(" ")[0]: part for part in signature.split("|")}
    return {name: part for name, part in parts.items() if name not in _GENERATION}


def _generated(provenance: Mapping[str, Any]) -> Iterator[str]:
    yield f"captionscale {__version__}"
    search = provenance.get("search")
    if isinstance(search, Mapping):
        for key, default in _SEARCH.items():
            if key in search and (search[key] != default or key in ("beam", "length_penalty")):
                yield f"{key.replace('_', '-')} {search[key]}"
    if isinstance(members := provenance.get("members"), list):
        yield f"ensemble {len(members)}"
    if "end_token_rewarded" in provenance:
        yield f"end {'rewarded' if provenance['end_token_rewarded'] else 'not rewarded'}"
