"""Sequences from fairseq's own SequenceGenerator, with its truncated proposals (top-k, top-p, temperature)."""
from __future__ import annotations

import math
from typing import Optional

import torch
import torch.nn.functional as F
from fairseq.search import Sampling
from fairseq.sequence_generator import SequenceGenerator
from torch import Tensor

from fairseq_earm.sampling.ancestral import max_lengths
from fairseq_earm.sampling.isolation import isolated
from fairseq_earm.sampling.samples import Samples
from fairseq_earm.sampling.scoring import decoder_input, full_logits, start_tokens


class GeneratorSampler:
    """Draws with `SequenceGenerator` and `Sampling`: what `fairseq-generate --sampling` would draw.

    Unlike there, an immediate end-of-sentence is allowed, and the one that the generator forces at the maximum length is
    taken off again. Its scores are not log q (top-k and top-p leave them un-renormalised), so log q comes from one
    teacher-forced pass over what was drawn.

    Args:
        dictionary: the target dictionary.
        max_len_a, max_len_b: as for `AncestralSampler`.
        topk, topp: sample among the k likeliest tokens, or the smallest set with probability p; −1 for all.
        temperature: logits are divided by it.
    """

    def __init__(self, dictionary, *, max_len_a=1.5, max_len_b=10, topk=-1, topp=-1.0, temperature=1.0):
        self.dictionary = dictionary
        self.max_len_a = max_len_a
        self.max_len_b = max_len_b
        self.topk = topk
        self.topp = topp
        self.temperature = temperature

    def __call__(self, model, net_input: dict, negatives: int = 1, prefix_tokens: Optional[Tensor] = None) -> Samples:
        """Draw `negatives` sequences for each source sentence; arguments as for `AncestralSampler`."""
        device = net_input["src_lengths"].device
        sources = torch.arange(net_input["src_lengths"].numel(), device=device).repeat_interleave(negatives)
        repeated = {
            k: v[sources] if torch.is_tensor(v) else v for k, v in net_input.items() if k != "prev_output_tokens"
        }
        limits = max_lengths(repeated["src_lengths"], self.max_len_a, self.max_len_b, model.decoder)
        starts = start_tokens(net_input, self.dictionary.eos())[sources]
        forced = None if prefix_tokens is None else prefix_tokens[sources]
        with isolated(model, net_input["src_tokens"]):
            hypotheses = self._generate(model, repeated, int(limits.max()), int(starts[0]), forced)
            tokens, inside, truncated = self._pack(hypotheses, limits)
            mask = inside.clone()
            mask[:, : 0 if forced is None else forced.size(1)] = False
            log_q = self._log_q(model, repeated, starts, tokens).masked_fill(~mask, 0.0)
        return Samples(tokens, mask, log_q, truncated, sources, limits)

    def _generate(self, model, net_input: dict, longest: int, start: int, forced: Optional[Tensor]) -> list:
        generator = SequenceGenerator(
            [model],
            self.dictionary,
            beam_size=1,
            max_len_a=0,
            max_len_b=longest,
            min_len=0,
            temperature=self.temperature,
            search_strategy=Sampling(self.dictionary, self.topk, self.topp),
        )
        hypotheses = generator.generate([model], {"net_input": net_input}, prefix_tokens=forced, bos_token=start)
        return [hypothesis[0]["tokens"] for hypothesis in hypotheses]

    def _pack(self, hypotheses: list, limits: Tensor) -> tuple:
        """Pad, and cut each row at its own limit: what the generator ended there was not drawn."""
        lengths = torch.tensor([len(h) for h in hypotheses], device=limits.device)
        truncated = lengths > limits
        lengths = torch.minimum(lengths, limits)
        tokens = torch.nn.utils.rnn.pad_sequence(hypotheses, batch_first=True, padding_value=self.dictionary.pad())
        tokens = tokens[:, : int(lengths.max())]
        inside = torch.arange(tokens.size(1), device=limits.device) < lengths.unsqueeze(1)
        return tokens.masked_fill(~inside, self.dictionary.pad()), inside, truncated

    def _log_q(self, model, net_input: dict, starts: Tensor, tokens: Tensor) -> Tensor:
        """(R, T) log-probability of each token under the truncated, renormalised softmax."""
        encoder_out = model.encoder(**net_input)
        output = model.decoder(decoder_input(tokens, starts), encoder_out=encoder_out)[0]
        # The generator divides what the decoder returns: logits, or the features that an adaptive softmax reads.
        logits = full_logits(model.decoder, (output / self.temperature,))
        log_probs = logits.float().log_softmax(-1)
        # As the generator does: padding leaves the distribution after the softmax, so the rest sums to less than one.
        log_probs[..., self.dictionary.pad()] = -math.inf
        log_probs = truncate_log_probs(log_probs, self.topk, self.topp)
        return log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def truncate_log_probs(log_probs: Tensor, topk: int = -1, topp: float = -1.0) -> Tensor:
    """Renormalise (..., V) log-probabilities on all tokens, on the k likeliest, or on the smallest set that reaches p.

    As in fairseq's `Sampling`, top-p goes before top-k, the token that carries the sum over p belongs to the set, and p
    is a share of one even where the probabilities sum to less.
    """
    if topp > 0:
        ordered, index = log_probs.sort(-1, descending=True)
        full_before = F.pad(ordered.exp().cumsum(-1)[..., :-1], (1, 0)).ge(topp)
        outside = full_before.scatter(-1, index, full_before)
    elif topk > 0:
        kept = log_probs.topk(topk, -1).indices
        outside = torch.ones_like(log_probs, dtype=torch.bool).scatter(-1, kept, False)
    else:
        return log_probs.log_softmax(-1)
    return log_probs.masked_fill(outside, -math.inf).log_softmax(-1)
