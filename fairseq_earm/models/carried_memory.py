"""What a batch of running text leaves for the batch that continues it."""
from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor


class CarriedMemory:
    """Hidden states with which parallel streams of text go on from one batch to the next.

    Every pass over a batch reads the same memory, however many there are (sampling, the data, the negatives, a batch
    tried again): what a pass leaves is read only once the next batch has begun. Held by a task, lent to a decoder, and
    part of neither: in no checkpoint, unknown to distributed wrappers.

    Attributes:
        blocks: (B,) numbers of the blocks of text that the present batch consists of; None before the first.
        read: (layers, B, M, C) hidden states that passes over the present batch look back at; None for none.
        left: the same for the batch that continues it.
    """

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.blocks: Optional[Tensor] = None
        self.read: Optional[Tensor] = None
        self.left: Optional[Tensor] = None

    def begin(self, blocks: Tensor) -> None:
        """Go on to another batch. One that does not continue the present one, row by row, starts without a memory.

        A batch that no pass was finished for, for want of device memory, leaves what it would have read.

        Args:
            blocks: (B,) number of the block of text in each row; there may be fewer rows than before, the first ones.
        """
        blocks = blocks.cpu()
        if self.blocks is not None and torch.equal(blocks, self.blocks):
            return
        continues = self.blocks is not None and torch.equal(blocks, self.blocks[: blocks.numel()] + 1)
        self.blocks, self.read = blocks, self.left if continues else None
        self.left = self.read
