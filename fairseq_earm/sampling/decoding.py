"""Decoding one token after the other: what a sampler asks of a decoder, and the plain way to have it from any."""
from __future__ import annotations

import logging
from typing import Optional

import torch
from fairseq.models import FairseqIncrementalDecoder
from torch import Tensor

from fairseq_earm.ebm.energy import widen
from fairseq_earm.ebm.products import LEAST, Products, bf16_helps
from fairseq_earm.errors import UsageError
from fairseq_earm.sampling.isolation import gathered, on_its_own
from fairseq_earm.sampling.prefill import prefill
from fairseq_earm.sampling.scoring import full_logits
from fairseq_earm.sampling.transformer_source import is_plain, read_source, source_of
from fairseq_earm.sampling.transformer_steps import TransformerSteps

logger = logging.getLogger(__name__)


class StockSteps:
    """fairseq's own incremental decoding, or a full pass per token where a decoder has none.

    Args:
        decoder: a fairseq decoder.
        encoder: the encoder of an encoder-decoder model, which knows how to pick rows of its output.
        encoder_out: its output.
    """

    # Finished rows leave the batch together, once they are this share of it: each time is a copy of the whole cache.
    dead_share = 0.1

    def __init__(self, decoder, encoder=None, encoder_out=None):
        self.decoder = decoder
        self.encoder = encoder
        self.encoder_out = encoder_out
        self.cache = {} if isinstance(decoder, FairseqIncrementalDecoder) else None
        if self.cache is None:
            _warn_without_cache(type(decoder).__name__)

    def prefill(self, prefixes: Tensor) -> None:
        """Read (R, P) tokens without padding, before any step."""
        prefill(self.decoder, prefixes, self.cache)

    def next_logits(self, prefixes: Tensor) -> Tensor:
        """(R, V) logits of the token after `prefixes` (R, t), whose last token was not read yet; at least float32."""
        extra = {} if self.cache is None else {"incremental_state": self.cache}
        if self.encoder is not None:
            extra["encoder_out"] = self.encoder_out
        output = self.decoder(prefixes, **extra)
        return widen(full_logits(self.decoder, output)[:, -1])

    def select(self, rows: Tensor) -> None:
        """Go on with these rows, in this order; some may be left out, some be there many times."""
        if self.encoder is not None:
            self.encoder_out = self.encoder.reorder_encoder_out(self.encoder_out, rows)
        if self.cache is not None:
            self.decoder.reorder_incremental_state_scripting(self.cache, rows)


def decode(decoder, encoder=None, inputs: Optional[dict] = None, *, bf16: bool = False):
    """The quickest way of decoding that knows this decoder: `TransformerSteps` or `StockSteps`.

    Args:
        encoder, inputs: of an encoder-decoder model, and what the encoder is to be called with.
        bf16: have `TransformerSteps` multiply in bfloat16, but for the logits.
    """
    known, products = TransformerSteps.knows(decoder), Products(bf16)
    if encoder is None:
        return TransformerSteps(decoder, None, products) if known else StockSteps(decoder)
    if known and is_plain(encoder) and set(inputs) <= {"src_tokens", "src_lengths"}:
        return TransformerSteps(decoder, read_source(encoder, inputs["src_tokens"], products), products)
    encoder_out = encoder(**inputs)
    source = source_of(encoder_out) if known else None
    return StockSteps(decoder, encoder, encoder_out) if source is None else TransformerSteps(decoder, source, products)


def check_bf16(model) -> None:
    """Refuse --earm-sampling-bf16 where no product would be in bfloat16.

    Raises:
        UsageError: a decoder that decodes in its own way, a model in another precision or of small layers, or a device
            without bfloat16.
    """
    kind = type(model.decoder).__name__
    with gathered(model), on_its_own(model):
        known = TransformerSteps.knows(model.decoder)
        weights = [parameter for parameter in model.decoder.layers.parameters()] if known else []
    device = next(model.decoder.parameters()).device
    problems = (
        (not known, f"{kind}, as it is set up here, is decoded by itself in its own precision"),
        (any(weight.dtype != torch.float32 for weight in weights), "the model has another precision than float32 already"),
        (max((weight.numel() for weight in weights), default=0) < LEAST, f"no layer has a matrix of {LEAST:,} elements, where it helps"),
        (not bf16_helps(device), f"this machine's {device.type} does not multiply in bfloat16"),
    )
    for problem, why in problems:
        if problem:
            raise UsageError(f"--earm-sampling-bf16: {why}; leave the flag out")


_warned = set()


def _warn_without_cache(decoder_name: str) -> None:
    if decoder_name not in _warned:
        _warned.add(decoder_name)
        logger.warning(
            f"{decoder_name} has no incremental decoding: negatives are sampled by a full pass per token, which is slow"
        )
