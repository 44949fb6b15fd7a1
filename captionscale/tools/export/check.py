"""Check exported programs against the model."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from captionscale.errors import UserError
from captionscale.model.captioner import Captioner
from captionscale.model.search.generate import search
from captionscale.progress import progress
from captionscale.tools.export.parts import ExportedCaptioner
from captionscale.vocab import START

TOLERANCE = 1e-3
_BATCH = 20


@dataclass(frozen=True)
class Check:
    """Result of the comparison."""

    images: int
    logits: float
    """Greatest difference of any logit, over all tokens of all captions."""
    tolerance: float = TOLERANCE

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)


@torch.no_grad()
def check(
    captioner: Captioner,
    exported: ExportedCaptioner,
    images: UInt8[Tensor, "image 3 height width"],
    max_words: int,
) -> Check:
    """Compare exported programs with their model.

    Args:
        captioner: In evaluation mode.
        exported: The programs.
        images: To caption by greedy search.
        max_words: Of a caption.

    Raises:
        UserError: A logit differs by more than `TOLERANCE`, or a caption differs.
    """
    greatest = 0.0
    with progress("comparing with the model", len(images), transient=True) as bar:
        for first in range(0, len(images), _BATCH):
            batch = images[first : first + _BATCH]
            features, theirs = captioner.encode(batch), exported.encode(batch)
            captions, others = (
                [found[0].tokens for found in search(*each, beam=1, max_words=max_words, length_penalty=0.0)]
                for each in ((captioner.decoder, features), (exported, theirs))
            )
            greatest = max(greatest, _difference(captioner, exported, features, theirs, captions))
            if greatest > TOLERANCE or captions != others:
                found = f"logits differ by {greatest:.2g}" + " and so do captions" * (captions != others)
                raise UserError(
                    f"export: {found} among images {first} to {first + len(batch) - 1}, expected a"
                    f" difference of at most {TOLERANCE:g} and the same captions, so nothing was written;"
                    " try --format torch, or another version of torch, onnxscript or onnxruntime"
                )
            bar.advance(len(batch))
    return Check(len(images), greatest)


def _difference(
    captioner: Captioner,
    exported: ExportedCaptioner,
    features: Tensor,
    theirs: Tensor,
    captions: Sequence[Sequence[int]],
) -> float:
    """Return the greatest difference of any logit when both read the same captions."""
    ours: Any = captioner.decoder.start(features)
    state = exported.start(theirs)
    tokens = torch.full((len(captions),), START)
    greatest = 0.0
    for time in range(max(map(len, captions))):
        logits, ours, _ = captioner.decoder.step(tokens, ours)
        found, state, _ = exported.step(tokens, state)
        reading = torch.tensor([time < len(caption) for caption in captions])
        difference = (logits - found).abs()[reading].max()
        # NaN is a difference.
        greatest = max(greatest, float(torch.nan_to_num(difference, nan=torch.inf)))
        tokens = torch.tensor([caption[time] if time < len(caption) else START for caption in captions])
    return greatest
