"""The language model beneath a residual energy: loaded, and checked for what is asked of it."""
from __future__ import annotations

import logging
from typing import Optional

import torch
from fairseq.models import FairseqIncrementalDecoder, FairseqLanguageModel

from fairseq_earm.errors import UsageError
from fairseq_earm.sampling.frozen import FrozenModel, load_frozen

logger = logging.getLogger(__name__)


def load_base_lm(
    path: str, task, *, flag: str, sequence_length: int, dtype: Optional[torch.dtype] = None
) -> FrozenModel:
    """`load_frozen` for a language model that can write sequences of `sequence_length` tokens.

    Raises:
        UsageError: as `load_frozen`; also another kind of model, a language model that does not write from left to right,
            or one with fewer positions.
    """
    frozen = load_frozen(path, task, flag=flag, dtype=dtype)
    model, kind = frozen.model, type(frozen.model).__name__
    if not isinstance(model, FairseqLanguageModel):
        raise UsageError(f"{flag} {path} is a {kind}: give a language model (fairseq-train --task language_modeling)")
    if not isinstance(model.decoder, FairseqIncrementalDecoder) or getattr(frozen.task, "targets", ["future"]) != ["future"]:
        raise UsageError(f"{flag} {path}: this {kind} does not write from left to right; give a language model that does")
    if getattr(getattr(frozen.task, "args", None), "add_bos_token", False):
        logger.warning(
            "%s %s was trained with --add-bos-token: here its sequences begin with end-of-sentence alone, as without it", flag, path
        )
    positions = model.max_positions()
    if positions is not None and sequence_length > positions:
        raise UsageError(
            f"--sequence-length {sequence_length}: {flag} {path} has {positions} positions; give a smaller length, or a model "
            f"trained with --tokens-per-sample {sequence_length} or more"
        )
    return frozen
