"""What training hides of a decoder's vectors."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class Dropout(nn.Module):
    """Hides a share of numbers in training: others at each word, or the same at all words of a caption.

    What goes into the recurrence and what comes out of it is hidden; its own memory never is.

    Source:
        Srivastava et al. 2014; the same numbers: Gal and Ghahramani 2016, "A Theoretically Grounded
        Application of Dropout in Recurrent Neural Networks" (arXiv:1512.05287), who hide memory too.
    """

    def __init__(self, p: float, variational: bool):
        """Build a dropout.

        Args:
            p: Share of numbers, that is hidden.
            variational: Whether a caption's words share a mask.
        """
        super().__init__()
        self.p, self.variational = p, variational

    def mask(self, captions: int, size: int, device: torch.device) -> Float[Tensor, "caption size"] | None:
        """Return what all of a caption's vectors are multiplied by; None if they do not share a mask."""
        if not (self.variational and self.training and self.p):
            return None
        return F.dropout(torch.ones(captions, size, device=device), self.p)

    def forward(
        self, vectors: Float[Tensor, "*batch size"], mask: Float[Tensor, "caption size"] | None = None
    ) -> Float[Tensor, "*batch size"]:
        """Return the vectors, in training with some numbers hidden and the others enlarged.

        Args:
            vectors: If a caption has several, its times are the second dimension.
            mask: What `mask` gave.
        """
        if mask is None and vectors.device.type == "cpu" and self.training and self.p:
            # PyTorch draws uniform numbers more than twice as fast as its own dropout's.
            kept = torch.rand(vectors.shape).ge_(self.p).div_(1 - self.p)
            return vectors * kept.to(vectors.dtype)
        if mask is None:
            return F.dropout(vectors, self.p, self.training)
        return vectors * (mask if vectors.dim() == mask.dim() else mask.unsqueeze(1))
