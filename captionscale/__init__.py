"""`captionscale.load`: captions from Python. Importing this does not import torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from captionscale.tools.captioner_api import CaptionPipeline

__all__ = ["load"]


def load(
    run: Path | str, *, checkpoint: str = "best", others: Sequence[Path | str] = ()
) -> "CaptionPipeline":
    """Return a run's model, ready to caption.

    ```python
    import captionscale
    for caption in captionscale.load("runs/attention").caption(["photo.jpg"]):
        print(caption.caption, caption.log_prob)
    ```

    Args:
        run: The --out of captionscale train, or a folder that `captionscale export --format hub` wrote.
        checkpoint: `best`, `last` or a step.
        others: More runs, for an ensemble with this one.

    Raises:
        UserError: No run or checkpoint, a damaged one, or runs that cannot form an ensemble.
    """
    from captionscale.tools.captioner_api import CaptionPipeline
    from captionscale.tools.ensemble import open_ensemble

    paths = [Path(other) for other in others]
    return CaptionPipeline(open_ensemble(Path(run), paths, checkpoint=checkpoint, overrides=[]))
