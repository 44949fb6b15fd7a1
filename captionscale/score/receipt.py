"""What a score is worth: the figures beside all that made them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from captionscale import version
from captionscale.errors import UserError
from captionscale.files import atomic
from captionscale.score.metrics import Scores

FORMAT = 1


def write_receipt(
    path: Path, scores: Scores, references: Mapping[int, Sequence[str]], made_by: Mapping[str, Any]
) -> None:
    """Write scores with what they are of.

    Args:
        path: Of the JSON file.
        scores: Of each image and of all.
        references: That they were scored against; the receipt keeps their hash.
        made_by: What else produced them: checkpoint, split, beam.
    """
    receipt = {
        "format": FORMAT,
        "tool": f"captionscale {version.__version__}",
        "metrics": f"pycocoevalcap {version_of('pycocoevalcap')}",
        "scores": scores.values,
        "images": len(scores.image_ids),
        "references": sum(len(captions) for captions in references.values()),
        "references_sha256": _hash_of(references),
        "made_by": dict(made_by),
        "per_image": {
            str(image_id): dict(zip(scores.per_image, values, strict=True))
            for image_id, *values in zip(scores.image_ids, *scores.per_image.values(), strict=True)
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as file:
        file.write(json.dumps(receipt, indent=1).encode())


def read_results(path: Path) -> dict[int, str]:
    """Read captions in COCO's results format: `[{"image_id": 42, "caption": "a dog"}, ...]`.

    Raises:
        UserError: Not such a file, or two captions for one image.
    """
    wanted = 'wanted a JSON list of {"image_id": 42, "caption": "a dog"}'
    try:
        lines = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: no COCO results ({reason}); {wanted}") from None
    results: dict[int, str] = {}
    for number, line in enumerate(lines if isinstance(lines, list) else [lines]):
        match line:
            case {"image_id": int(image_id), "caption": str(caption)}:
                if image_id in results:
                    raise UserError(
                        f"{path}: image {image_id} has more than one caption, wanted one; delete the others"
                    )
                results[image_id] = caption
            case _:
                raise UserError(f"{path}: line {number} of the list is {line!r:.60}; {wanted}")
    return results


def _hash_of(references: Mapping[int, Sequence[str]]) -> str:
    facts = json.dumps([[image_id, list(references[image_id])] for image_id in sorted(references)])
    return hashlib.sha256(facts.encode()).hexdigest()
