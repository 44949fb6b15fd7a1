"""Captions in COCO's results format, `[{"image_id": 42, "caption": "a dog"}, ...]`."""

import json
from pathlib import Path
from typing import TypedDict

from captionscale import parsing
from captionscale.errors import UserError
from captionscale.files import MB, atomic_write, read_file

_MAX_BYTES = 1024 * MB


class Result(TypedDict):
    """One caption in COCO's results format."""

    image_id: int
    caption: str


def write_results(results: list[Result], path: Path) -> None:
    """Write captions in COCO's results format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(json.dumps(results, ensure_ascii=False).encode())


def read_results(path: Path) -> dict[int, str]:
    """Read captions in COCO's results format.

    Raises:
        UserError: No such file, another format, or two captions for one image.
    """
    expected = 'expected a JSON list of {"image_id": 42, "caption": "a dog"}; write it again in that form'
    try:
        lines = parsing.loads(read_file(path, _MAX_BYTES))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}), expected COCO results; correct the path"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: no COCO results ({error}); {expected}") from None
    results: dict[int, str] = {}
    for number, line in enumerate(lines if isinstance(lines, list) else [lines]):
        match line:
            case {"image_id": int(image_id), "caption": str(caption)} if not isinstance(image_id, bool):
                if image_id in results:
                    raise UserError(
                        f"{path}: image {image_id} has more than one caption, expected one; delete the others"
                    )
                results[image_id] = caption
            case _:
                raise UserError(f"{path}: line {number} of the list is {line!r:.60}; {expected}")
    return results
