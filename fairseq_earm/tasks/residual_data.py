"""Sequences of text as the batches of an energy network."""
from __future__ import annotations

import torch

from fairseq_earm.sampling.blocks import Blocks
from fairseq_earm.tasks.sized_data import SizedDataset


class ResidualDataset(SizedDataset):
    """Blocks of text, the first `prefix_length` tokens of each given and the rest predicted.

    A batch is {"id": (B,), "nsentences", "ntokens", "net_input": {"src_tokens": (B, L)}, "target": (B, L − prefix_length),
    "split"}, the continuations being part of `src_tokens` too.

    Args:
        split: its name.
        shuffle: whether neighbours in the text are kept out of one batch, as fairseq does with text of one length. In
            evaluation the order is the text's, so that a batch, and with it its negatives, depends on no seed.
    """

    def __init__(self, blocks: Blocks, prefix_length: int, split: str, *, shuffle: bool):
        self.blocks = blocks
        self.prefix_length = prefix_length
        self.split = split
        self.shuffle = shuffle
        self.sizes = blocks.sizes

    def __getitem__(self, index: int) -> dict:
        return {"id": int(index), "tokens": self.blocks[index]}

    def collater(self, samples: list) -> dict:
        if not samples:
            return {}
        tokens = torch.stack([sample["tokens"] for sample in samples])
        return {
            "id": torch.tensor([sample["id"] for sample in samples]),
            "nsentences": tokens.size(0),
            "ntokens": tokens.numel(),
            "net_input": {"src_tokens": tokens},
            "target": tokens[:, self.prefix_length :],
            "split": self.split,
        }

    @property
    def supports_prefetch(self) -> bool:
        return self.blocks.supports_prefetch

    def prefetch(self, indices) -> None:
        self.blocks.prefetch(indices)
