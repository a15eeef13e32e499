"""What every sampler returns."""
from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Samples(NamedTuple):
    """Sequences drawn from a model, N per source, in the order of the sources (row i belongs to source i // N).

    Attributes:
        tokens: (B·N, T) right-padded token indices, end-of-sentence included, beginning-of-sentence not.
        mask: (B·N, T) True on drawn tokens.
        log_q: (B·N, T) log-probability with which the sampler drew each token, 0 where masked.
        truncated: (B·N,) True where the maximum length was reached before end-of-sentence.
        sources: (B·N,) index of the source sentence of each row.
    """

    tokens: Tensor
    mask: Tensor
    log_q: Tensor
    truncated: Tensor
    sources: Tensor

    @property
    def lengths(self) -> Tensor:
        """(B·N,) number of drawn tokens, end-of-sentence included."""
        return self.mask.sum(1)
