"""Ancestral sampling from an encoder-decoder model's own softmax, token by token."""
from __future__ import annotations

import math
from typing import Optional

import torch
from torch import Tensor

from fairseq_earm.sampling.decoding import decode
from fairseq_earm.sampling.draw import draw
from fairseq_earm.sampling.isolation import isolated
from fairseq_earm.sampling.samples import Samples
from fairseq_earm.sampling.scoring import start_tokens

# Steps after which the processor asks who has finished: a GPU would have to be waited for each time.
LOOK_EVERY = {"cuda": 8}

# A larger number of tokens may not be an integer any more.
LONGEST = 2**31


class AncestralSampler:
    """Draws x ~ q(x | source), with the exact log-probability of every draw.

    The one difference from the model's softmax: padding is never drawn (no decoder can read it back), and the rest is
    renormalised. A sequence that reaches its maximum length is cut there and marked; no end-of-sentence is forced on it
    or charged to it.

    Args:
        dictionary: the target dictionary.
        max_len_a, max_len_b: a sample has at most a·(source length) + b tokens, end-of-sentence included, and never
            more than the decoder has positions for (one is kept for the step after the last token).
        bf16: as for `decode`; log q is then that of what was drawn from.
    """

    def __init__(self, dictionary, *, max_len_a: float = 1.5, max_len_b: int = 10, bf16: bool = False):
        self.pad = dictionary.pad()
        self.eos = dictionary.eos()
        self.max_len_a = max_len_a
        self.max_len_b = max_len_b
        self.bf16 = bf16

    def __call__(self, model, net_input: dict, negatives: int = 1, prefix_tokens: Optional[Tensor] = None) -> Samples:
        """Draw `negatives` sequences for each source sentence of a batch.

        Args:
            model: a fairseq encoder-decoder model; its mode and the global random state are left as they are.
            net_input: the batch's `net_input`; of its `prev_output_tokens` only the start token is used.
            prefix_tokens: (B, P) tokens that every sample begins with (a language tag); not masked in as drawn.
        """
        inputs = {k: v for k, v in net_input.items() if k != "prev_output_tokens"}
        source_lengths = inputs["src_lengths"]
        sources = torch.arange(source_lengths.numel(), device=source_lengths.device).repeat_interleave(negatives)
        limits = max_lengths(source_lengths, self.max_len_a, self.max_len_b, model.decoder)[sources]
        starts = start_tokens(net_input, self.eos)[sources]
        forced = None if prefix_tokens is None else prefix_tokens[sources]
        with isolated(model, inputs["src_tokens"]):
            decoding = decode(model.decoder, model.encoder, inputs, bf16=self.bf16)
            decoding.select(sources)
            return self._draw_all(decoding, sources, starts, limits, forced)

    def _draw_all(self, decoding, sources, starts, limits, forced: Optional[Tensor]) -> Samples:
        count, longest = sources.numel(), int(limits.max())
        given = 0 if forced is None else forced.size(1)
        prefixes = sources.new_full((count, longest + 1), self.pad)
        prefixes[:, 0] = starts
        log_q = torch.zeros(count, longest, device=sources.device)
        lengths = torch.zeros_like(sources)
        truncated = torch.zeros_like(sources, dtype=torch.bool)
        rows = torch.arange(count, device=sources.device)
        live = torch.ones_like(rows, dtype=torch.bool)
        steps_between_looks = LOOK_EVERY.get(rows.device.type, 1)

        for step in range(longest):
            # A finished row that is still in the batch reads end-of-sentence: anything but padding will do.
            read = prefixes[rows, : step + 1]
            logits = decoding.next_logits(read.masked_fill(read.eq(self.pad), self.eos))
            logits[:, self.pad] = -math.inf
            tokens, log_probs = draw(logits)
            if step < given:
                tokens, log_probs = forced[rows, step], torch.zeros_like(log_probs)
            prefixes[rows, step + 1] = tokens.masked_fill(~live, self.pad)
            log_q[rows, step] = log_probs.masked_fill(~live, 0.0).to(log_q.dtype)
            lengths[rows] += live
            ended = tokens.eq(self.eos) if step >= given else torch.zeros_like(live)
            cut = ~ended & (limits[rows] <= step + 1)
            truncated[rows] |= live & cut
            live = live & ~ended & ~cut
            if (step + 1) % steps_between_looks:
                continue
            remaining = int(live.sum())
            if remaining == 0:
                break
            if remaining < rows.numel() and remaining <= (1 - decoding.dead_share) * rows.numel():
                kept = _closed_up(live, remaining)
                decoding.select(kept)
                rows, live = rows[kept], live[kept]

        return self._pack(prefixes[:, 1:], log_q, lengths, given, truncated, sources)._replace(limits=limits)

    def _pack(self, tokens, log_q, lengths, given, truncated, sources) -> Samples:
        steps = torch.arange(int(lengths.max()), device=lengths.device)
        inside = steps < lengths.unsqueeze(1)
        tokens = tokens[:, : steps.numel()].masked_fill(~inside, self.pad)
        return Samples(tokens, inside & (steps >= given), log_q[:, : steps.numel()], truncated, sources)


def max_lengths(source_lengths: Tensor, max_len_a: float, max_len_b: int, decoder) -> Tensor:
    """(B,) most tokens of a sample: a·(source length) + b, at least 1, within the decoder's positions."""
    limits = (max_len_a * source_lengths + min(max_len_b, LONGEST)).clamp(1, LONGEST).long()
    positions = decoder.max_positions()
    return limits if positions is None else limits.clamp_max(int(positions) - 1)


def _closed_up(live: Tensor, count: int) -> Tensor:
    """The `count` rows that are live, the last ones of them in the places of those that are not."""
    gaps = (~live[:count]).nonzero().squeeze(1)
    kept = torch.arange(count, device=live.device)
    kept[gaps] = live[count:].nonzero().squeeze(1) + count
    return kept
