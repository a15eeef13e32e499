"""Text cut into sequences of one fixed length, the same ones for training, pre-generating and measuring."""
from __future__ import annotations

import hashlib
import logging
import struct
from typing import Optional

import numpy as np
from fairseq.data import FairseqDataset, TokenBlockDataset, data_utils
from torch import Tensor

from fairseq_earm.errors import UsageError

logger = logging.getLogger(__name__)


class Blocks(FairseqDataset):
    """Sequences of exactly `sequence_length` tokens: item i is a (sequence_length,) LongTensor, in the text's order.

    Attributes:
        sizes: (len,) the length of each item, as fairseq's batching wants it.
        skipped: blocks of the text that are left out because they are shorter.
        cut: (len,) True where the block is a longer sentence, which loses its end.
    """

    def __init__(self, blocks: TokenBlockDataset, sequence_length: int):
        bounds = blocks.slice_indices.astype(np.int64)  # its `sizes` overflow with sentences of 65,536 tokens
        self._blocks = blocks
        lengths = bounds[:, 1] - bounds[:, 0]
        self._kept = np.flatnonzero(lengths >= sequence_length)
        self.sequence_length = sequence_length
        self.skipped = len(blocks) - len(self._kept)
        self.cut = lengths[self._kept] > sequence_length
        self.sizes = np.full(len(self._kept), sequence_length, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Tensor:
        return self._blocks[self._kept[index]][: self.sequence_length].long()

    @property
    def supports_prefetch(self) -> bool:
        return self._blocks.supports_prefetch

    def prefetch(self, indices) -> None:
        """Read these items into memory, which fairseq's format `cached` needs before any item is taken."""
        self._blocks.prefetch([int(self._kept[index]) for index in indices])

    def fingerprint(self) -> str:
        """SHA-256 of the number of sequences and of up to 64 of them, spread evenly: tells other text, or other blocks, apart."""
        chosen = np.unique(np.linspace(0, len(self) - 1, 64).round().astype(np.int64)).tolist()
        if self.supports_prefetch:
            self.prefetch(chosen)
        digest = hashlib.sha256(str(len(self)).encode())
        for index in chosen:
            digest.update(self[index].numpy().astype("<i8").tobytes())
        return digest.hexdigest()


def load_blocks(
    path_prefix: str,
    dictionary,
    *,
    sequence_length: int,
    break_mode: Optional[str] = "none",
    dataset_impl: Optional[str] = None,
    combine: bool = False,
) -> Blocks:
    """Load a split of binarised text as sequences of exactly `sequence_length` tokens.

    With break mode `none` these are the consecutive blocks of the whole text. Other modes (fairseq's
    `--sample-break-mode`) make blocks of whole sentences: shorter ones are skipped, longer ones lose their end.
    How many were skipped, and how many cut, is logged.

    Args:
        path_prefix: such as data-bin/train.
        dictionary: the data's.
        dataset_impl: fairseq's `--dataset-impl`; by default recognised from the files.
        combine: also read path_prefix + "1", "2", ... as fairseq does for the training split.
    Raises:
        UsageError: a length below 1, no such split, a damaged one, or no sequence that is long enough.
    """
    if sequence_length < 1:
        raise UsageError(f"--sequence-length {sequence_length} leaves no token: give 1 or more")
    text = _load_text(path_prefix, dictionary, dataset_impl, combine)
    if len(text) == 0:
        raise UsageError(f"{path_prefix} holds no text: preprocess it again, or name another split")
    blocks = TokenBlockDataset(
        text, text.sizes, sequence_length, pad=dictionary.pad(), eos=dictionary.eos(), break_mode=break_mode
    )
    kept = Blocks(blocks, sequence_length)
    if len(kept) == 0:
        raise UsageError(
            f"--sequence-length {sequence_length}: {path_prefix} has {int(np.sum(text.sizes)):,} tokens and no sequence that "
            f"long (--sample-break-mode {break_mode or 'none'}): give a smaller length, or more text"
        )
    logger.info(
        f"{path_prefix}: {len(kept):,} sequences of {sequence_length} tokens; {kept.skipped:,} shorter ones skipped"
        f"{cut_note(int(kept.cut.sum()))}"
    )
    return kept


def cut_note(cut: int) -> str:
    """What a message that counts sequences adds about those that lost their end."""
    return f"; {cut:,} longer sentences lost their end" if cut else ""


def _load_text(path_prefix: str, dictionary, dataset_impl: Optional[str], combine: bool):
    try:
        text = data_utils.load_indexed_dataset(path_prefix, dictionary, dataset_impl, combine=combine)
    except (AssertionError, EOFError, KeyError, OSError, ValueError, struct.error) as error:
        reason = str(error).strip().split("\n")[0]
        raise UsageError(f"{path_prefix}.idx or .bin is damaged ({reason}): preprocess the text again") from error
    if text is None:
        raise UsageError(f"{path_prefix}: there is no such split (.bin and .idx): run fairseq-preprocess, or name another split")
    return text
