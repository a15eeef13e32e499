"""What every sampler returns."""
from __future__ import annotations

from typing import NamedTuple, Optional

from torch import Tensor

# Its powers, modulo 2^64, tell positions apart (Knuth's MMIX generator).
MULTIPLIER = 6364136223846793005


class Samples(NamedTuple):
    """Sequences drawn from a model, N per source, in the order of the sources (row i belongs to source i // N).

    Attributes:
        tokens: (B·N, T) right-padded token indices, end-of-sentence included, beginning-of-sentence not.
        mask: (B·N, T) True on drawn tokens.
        log_q: (B·N, T) log-probability with which the sampler drew each token, 0 where masked.
        truncated: (B·N,) True where the maximum length was reached before end-of-sentence.
        sources: (B·N,) index of the source sentence of each row.
        limits: (B·N,) the most tokens that each row could have had, given ones included; None: no row could be cut.
    """

    tokens: Tensor
    mask: Tensor
    log_q: Tensor
    truncated: Tensor
    sources: Tensor
    limits: Optional[Tensor] = None

    @property
    def lengths(self) -> Tensor:
        """(B·N,) number of drawn tokens, end-of-sentence included."""
        return self.mask.sum(1)

    @property
    def distinct(self) -> int:
        """Number of different sequences of drawn tokens among the rows, whatever their sources.

        Rows are told apart by one 64-bit number each, so that two that differ pass for the same next to never.
        """
        powers = self.tokens.new_full((self.tokens.size(1),), MULTIPLIER).cumprod(0)
        return ((self.tokens + 1) * self.mask * powers).sum(1).unique().numel()
