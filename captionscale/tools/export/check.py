"""Check exported programs against the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from captionscale.errors import UserError
from captionscale.model.captioner import Captioner
from captionscale.model.decoders.decoder import StepDecoder
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


@torch.no_grad()
def check(
    captioner: Captioner,
    exported: ExportedCaptioner,
    images: UInt8[Tensor, "image 3 height width"],
    max_words: int,
) -> Check:
    """Compare exported programs with their model, in evaluation mode, by greedy search.

    Raises:
        UserError: A logit differs by more than `TOLERANCE`, or a caption differs.
    """
    greatest = 0.0
    with progress("comparing with the model", len(images), transient=True) as bar:
        for first in range(0, len(images), _BATCH):
            batch = images[first : first + _BATCH]
            pairs = (captioner.decoder, captioner.encode(batch)), (exported, exported.encode(batch))
            captions, others = (
                [found[0].tokens for found in search(*pair, beam=1, max_words=max_words, length_penalty=0.0)]
                for pair in pairs
            )
            greatest = max(greatest, _difference(*pairs, captions))
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
    model: tuple[StepDecoder, Tensor],
    exported: tuple[StepDecoder, Tensor],
    captions: Sequence[Sequence[int]],
) -> float:
    """Return the greatest difference of any logit when both decoders read the same captions."""
    (decoder, features), (program, exported_features) = model, exported
    state: Any = decoder.start(features)
    exported_state: Any = program.start(exported_features)
    rows = [torch.tensor([START, *caption]) for caption in captions]
    inputs = pad_sequence(rows, batch_first=True, padding_value=START)
    greatest = 0.0
    for time, tokens in enumerate(inputs[:, :-1].unbind(1)):
        logits, state, _ = decoder.step(tokens, state)
        exported_logits, exported_state, _ = program.step(tokens, exported_state)
        unfinished = torch.tensor([time < len(caption) for caption in captions])
        difference = (logits - exported_logits).abs()[unfinished].max()
        # NaN is a difference.
        greatest = max(greatest, float(torch.nan_to_num(difference, nan=torch.inf)))
    return greatest
