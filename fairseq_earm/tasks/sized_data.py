"""Datasets whose items each have a known number of tokens."""
from __future__ import annotations

import numpy as np
from fairseq.data import FairseqDataset


class SizedDataset(FairseqDataset):
    """What fairseq's batching asks of a dataset.

    Attributes:
        sizes: (len,) tokens of each item.
        shuffle: whether neighbours are kept out of one batch.
    """

    sizes: np.ndarray
    shuffle: bool

    def __len__(self) -> int:
        return len(self.sizes)

    def num_tokens(self, index: int) -> int:
        """Tokens of an item, for batches by number of tokens."""
        return int(self.sizes[index])

    def size(self, index: int) -> int:
        """Tokens of an item, for those that are too long."""
        return int(self.sizes[index])

    def num_tokens_vec(self, indices) -> np.ndarray:
        """Tokens of several items."""
        return self.sizes[indices]

    def ordered_indices(self) -> np.ndarray:
        """The order in which items are put into batches."""
        return np.random.permutation(len(self)) if self.shuffle else np.arange(len(self))
