"""Dropout with a mask per word, or one for all words of a caption."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class Dropout(nn.Dropout):
    """Dropout that can share a mask among all words of a caption (variational dropout).

    It applies to what enters and leaves the recurrence, never to its state.

    Source:
        Srivastava et al. 2014. Shared masks: Gal and Ghahramani 2016, "A Theoretically Grounded Application
        of Dropout in Recurrent Neural Networks" (arXiv:1512.05287), who also drop the state.
    """

    def __init__(self, p: float, variational: bool):
        super().__init__(p)
        self.variational = variational

    def mask(self, captions: int, size: int, device: torch.device) -> Float[Tensor, "caption size"] | None:
        """Return the factors for all words of each caption; None if words do not share a mask."""
        if not (self.variational and self.training and self.p):
            return None
        return F.dropout(torch.ones(captions, size, device=device), self.p)

    def forward(
        self, vectors: Float[Tensor, "*batch size"], mask: Float[Tensor, "caption size"] | None = None
    ) -> Float[Tensor, "*batch size"]:
        """Return the vectors with dropout in training; the second of three dimensions is time."""
        if mask is not None:
            return vectors * (mask if vectors.dim() == mask.dim() else mask.unsqueeze(1))
        if not (self.training and self.p):
            return vectors
        # On a CPU, PyTorch draws uniform numbers twice as fast as F.dropout draws its mask.
        kept = torch.rand(vectors.shape, device=vectors.device).ge_(self.p).div_(1 - self.p)
        return vectors * kept.to(vectors.dtype)
