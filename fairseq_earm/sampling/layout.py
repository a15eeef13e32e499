"""Whole sequences as an energy network reads them: what is given, then what was drawn or is data."""
from __future__ import annotations

import logging
from typing import Optional, Set

import torch
from fairseq.data import Dictionary
from torch import Tensor

from fairseq_earm.sampling.frozen import first_difference

logger = logging.getLogger(__name__)

_warned_of: Set[int] = set()  # limits of which a warning has spoken


def prefix_continuation(prefix: Tensor, continuation: Tensor, sources: Optional[Tensor] = None) -> Tensor:
    """(R, P + T) prefixes and their continuations, for text in blocks of one length.

    Args:
        prefix: (B, P) tokens without padding.
        continuation: (R, T) tokens without padding.
        sources: (R,) row of `prefix` that each continuation follows; by default R is a multiple of B, and the first R/B
            continuations follow the first prefix, and so on (as samplers return them).
    """
    if sources is None:
        sources = _in_order(prefix.size(0), continuation)
    return torch.cat([prefix[sources], continuation], 1)


def source_target(
    src_tokens: Tensor, target: Tensor, sources: Optional[Tensor] = None, *, pad: int, shift: int = 0,
    longest: Optional[int] = None,
) -> Tensor:
    """(R, L) source sentences and what translates them, one right behind the other, right-padded to the longest.

    Args:
        src_tokens: (B, S) sentences with end-of-sentence, padded on either side.
        target: (R, T) translations, padded on either side.
        sources: (R,) row of `src_tokens` that each translation belongs to; by default as for `prefix_continuation`.
        pad: index of padding in both.
        shift: added to the target's tokens, see `joint_dictionary`.
        longest: most tokens that the network reads; what comes behind them is left out, which is said once.
    """
    if sources is None:
        sources = _in_order(src_tokens.size(0), target)
    shifted = torch.where(target.eq(pad), target, target + shift)
    tokens = torch.cat([src_tokens[sources], shifted], 1)
    inside = tokens.ne(pad)
    # Padding goes to the end, and what is left keeps its order.
    order = (~inside).long().sort(dim=1, stable=True).indices
    lengths = inside.sum(1)
    length = int(lengths.max()) if inside.numel() else 0
    if longest is not None and length > longest:
        _warn_of_cut(lengths, longest)
        length = longest
    return tokens.gather(1, order)[:, :length]


def _warn_of_cut(lengths: Tensor, longest: int) -> None:
    if longest in _warned_of:
        return
    _warned_of.add(longest)
    logger.warning(
        "%d of %d sequences of a batch, source and translation together, are longer than the %d tokens that the energy network "
        "reads: it judges them without their end; train it with a larger --max-positions, or leave long sentences out (said once)",
        int((lengths > longest).sum()), lengths.numel(), longest,
    )


def joint_dictionary(source: Dictionary, target: Dictionary) -> tuple:
    """A dictionary of both languages, and by how much a target token's index lies behind its own in it.

    Where the two are the same, that is the source's and 0: both languages share their embeddings. Otherwise all of the
    target's symbols come behind the source's, marked, so that the energy network tells a word of one language from its
    namesake in the other. A symbol that a dictionary repeats (#fairseq:overwrite) keeps all of its places: tokens are
    indices, and every one of them needs an embedding.
    """
    if not first_difference(source, target):
        return source, 0
    joint = Dictionary()
    for symbol in source.symbols[joint.nspecial :]:
        joint.add_symbol(symbol, overwrite=True)
    for symbol in target.symbols:
        joint.add_symbol(f"{symbol} (target)", overwrite=True)
    return joint, len(source)


def _in_order(rows: int, continuation: Tensor) -> Tensor:
    return torch.arange(rows, device=continuation.device).repeat_interleave(continuation.size(0) // max(rows, 1))
