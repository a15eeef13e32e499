"""Continuations of given prefixes, of a fixed number of tokens, drawn from a language model."""
from __future__ import annotations

import math
from typing import Optional

import torch
from torch import Tensor

from fairseq_earm.ebm.energy import widen
from fairseq_earm.errors import UsageError
from fairseq_earm.sampling.decoding import decode
from fairseq_earm.sampling.draw import draw, without_padding
from fairseq_earm.sampling.samples import Samples
from fairseq_earm.sampling.scoring import decoder_input, full_logits
from fairseq_earm.sampling.search import truncate_log_probs


class ContinuationSampler:
    """Draws `length` tokens after each prefix, as a language model that was trained on blocks of text writes them.

    End-of-sentence is a token like any other in such text, and ends nothing. Padding is never drawn, and the rest
    renormalised.

    Args:
        dictionary: the language model's dictionary.
        length: tokens of a continuation.
        temperature: logits are divided by it.
        topk, topp: sample among the k likeliest tokens, or the smallest set with probability p; −1 for all.
        bf16: as for `decode`.
    """

    def __init__(
        self, dictionary, length: int, *, temperature: float = 1.0, topk: int = -1, topp: float = -1.0, bf16: bool = False,
    ):
        self.pad = dictionary.pad()
        self.eos = dictionary.eos()
        self.length = length
        self.temperature = temperature
        self.topk = topk
        self.topp = topp
        self.bf16 = bf16

    @torch.no_grad()
    def __call__(
        self, model, prefixes: Tensor, samples: int = 1, *, generator: Optional[torch.Generator] = None
    ) -> Samples:
        """Draw `samples` continuations of each prefix.

        Args:
            model: a fairseq language model in eval mode.
            prefixes: (B, P) tokens without padding; P may be 0.
            generator: source of random numbers on the prefixes' device; by default the global one.
        Returns:
            Samples with tokens (B·samples, length); log_q is exact under the truncated softmax.
        Raises:
            UsageError: probabilities that are no numbers, as half precision or a diverged training leave them.
        """
        drawn = self.go_on(model, decoder_input(prefixes, self.eos, extra_step=True), samples, generator=generator)
        finite_log_q(drawn.log_q)
        return drawn

    @torch.no_grad()
    def go_on(
        self, model, read: Tensor, samples: int = 1, *, length: Optional[int] = None, to_the_end: bool = False,
        generator: Optional[torch.Generator] = None,
    ) -> Samples:
        """As `__call__`, from all that the decoder reads before the first drawn token.

        Nothing is refused: a model in training that is no longer finite has a loss that is not either, which is dealt
        with on all workers alike.

        Args:
            read: (B, 1 + P) tokens without padding, the decoder's first input included.
            length: tokens to draw, by default the sampler's.
            to_the_end: draw no further once there is an end-of-sentence in every row.
        """
        length = self.length if length is None else length
        sources = torch.arange(read.size(0), device=read.device).repeat_interleave(samples)
        decoding = decode(model.decoder, bf16=self.bf16)
        decoding.prefill(read[:, :-1])
        logits = decoding.next_logits(read)[sources]
        decoding.select(sources)
        read = read[sources]
        given, log_q = read.size(1), []
        for step in range(length):
            if step > 0:
                logits = decoding.next_logits(read)
            tokens, log_probs = draw(self._proposal(logits), generator)
            read = torch.cat([read, tokens.unsqueeze(1)], 1)
            log_q.append(log_probs)
            if to_the_end and bool(read[:, given:].eq(self.eos).any(1).all()):
                break
        tokens = read[:, given:]
        everywhere = torch.ones_like(tokens, dtype=torch.bool)
        truncated = torch.zeros_like(sources, dtype=torch.bool)
        return Samples(tokens, everywhere, torch.stack(log_q, 1), truncated, sources)

    def _proposal(self, logits: Tensor) -> Tensor:
        logits[:, self.pad] = -math.inf
        if self.temperature != 1:
            logits = logits / self.temperature
        if self.topk < 1 and self.topp <= 0:
            return logits  # `draw` normalises them
        return truncate_log_probs(logits.log_softmax(-1), self.topk, self.topp)


def finite_log_q(log_q: Tensor) -> Tensor:
    """Log-probabilities of what a base model drew, every one of them finite; a UsageError otherwise."""
    if not log_q.isfinite().all():
        raise UsageError(
            "the base model's probabilities are no numbers, and nothing can be drawn by them: try float32 (--dtype, --base-dtype, "
            "without --fp16), or another checkpoint"
        )
    return log_q


@torch.no_grad()
def score_continuations(model, tokens: Tensor, prefix_length: int, *, pad: int, eos: int) -> Tensor:
    """(R, L − prefix_length) log-probability of each token after the prefix, in nats, as `ContinuationSampler` draws it.

    Args:
        model: a fairseq language model in eval mode.
        tokens: (R, L) prefixes and their continuations, without padding.
        pad, eos: the dictionary's.
    """
    logits = full_logits(model.decoder, model.decoder(decoder_input(tokens, eos)))[:, prefix_length:]
    log_probs = without_padding(widen(logits), pad).log_softmax(-1)
    return log_probs.gather(-1, tokens[:, prefix_length:].unsqueeze(-1)).squeeze(-1)
