"""Captions in COCO's results format, `[{"image_id": 42, "caption": "a dog"}, ...]`, written and read."""

import json
from pathlib import Path
from typing import TypedDict

from captionscale import parsing
from captionscale.errors import UserError
from captionscale.files import MB, atomic_write, read_file

_MAX_BYTES = 1024 * MB


class Result(TypedDict):
    """One line of COCO's results format."""

    image_id: int
    caption: str


def write_results(results: list[Result], path: Path) -> None:
    """Write captions as COCO's evaluation server reads them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(json.dumps(results, ensure_ascii=False).encode())


def read_results(path: Path) -> dict[int, str]:
    """Read captions in COCO's results format: `[{"image_id": 42, "caption": "a dog"}, ...]`.

    Raises:
        UserError: Not such a file, or two captions for one image.
    """
    wanted = 'wanted a JSON list of {"image_id": 42, "caption": "a dog"}; write it again in that form'
    try:
        lines = parsing.loads(read_file(path, _MAX_BYTES))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}), wanted COCO results; correct the path"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: no COCO results ({error}); {wanted}") from None
    results: dict[int, str] = {}
    for number, line in enumerate(lines if isinstance(lines, list) else [lines]):
        match line:
            case {"image_id": int(image_id), "caption": str(caption)} if not isinstance(image_id, bool):
                if image_id in results:
                    raise UserError(
                        f"{path}: image {image_id} has more than one caption, wanted one; delete the others"
                    )
                results[image_id] = caption
            case _:
                raise UserError(f"{path}: line {number} of the list is {line!r:.60}; {wanted}")
    return results
