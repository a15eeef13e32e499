"""A real network in the place of the tabular model of `tabular.py`, so that E-ARM's exact objective can be had for it.

Its conditional probabilities are rounded to multiples of 1/`parts`, so that a batch in which every sequence stands
q(x)·parts^L times *is* the distribution q and an estimator over it has no noise; logsumexps stay the network's own, and so
do all gradients (the rounding is a constant added to the logits).
"""
from __future__ import annotations

import itertools
from typing import Callable, Optional, Sequence

import torch
from torch import Tensor


def round_probabilities(decoder, tokens: Sequence[int], parts: int) -> None:
    """From now on each pass of `decoder` says probabilities that are multiples of 1/`parts`, for `tokens` only, each at least once."""

    def rounded(module, inputs, output):
        logits = output[0]
        log_q = dyadic(logits.detach()[..., tokens].softmax(-1), parts).log()
        fixed = torch.full_like(logits, -1e4)
        fixed[..., tokens] = log_q + logits.detach().logsumexp(-1, keepdim=True)
        return (logits + (fixed - logits).detach(), *output[1:])

    decoder.register_forward_hook(rounded)


def dyadic(probabilities: Tensor, parts: int) -> Tensor:
    """(..., V) multiples of 1/parts near the given probabilities, every one at least 1/parts."""
    wanted = probabilities * parts
    counts = wanted.floor().clamp_min(1)
    for _ in range(parts):
        missing = parts - counts.sum(-1, keepdim=True)
        up = torch.zeros_like(counts).scatter(-1, (wanted - counts).argmax(-1, keepdim=True), 1.0)
        large = torch.where(counts > 1, counts - wanted, torch.full_like(counts, -9.0))
        down = torch.zeros_like(counts).scatter(-1, large.argmax(-1, keepdim=True), 1.0)
        counts = counts + up * (missing > 0) - down * (missing < 0)
    assert bool((counts.sum(-1) == parts).all())
    return counts / parts


class Network:
    """What `tabular.exact_objective` asks of a model, answered by one full pass of a network for each prefix.

    Args:
        logits: (source, prefix) → (V,) logits of the next token.
        tokens: tokens that are ever said.
        length: tokens of a sequence at most.
        sources: number of sources.
        eos: the token that ends a sequence, if one does.
    """

    def __init__(self, logits: Callable, tokens: Sequence[int], length: int, sources: int, eos: Optional[int] = None):
        self.next_logits, self.length, self.sources, self.eos = logits, length, sources, eos
        self.prefixes = [
            prefix
            for size in range(length + 1)
            for prefix in itertools.product(tokens, repeat=size)
            if eos not in prefix[:-1]
        ]
        self.known = {}

    def logits(self, source: int, prefix: tuple) -> Tensor:
        if (source, prefix) not in self.known:
            self.known[source, prefix] = self.next_logits(source, prefix)
        return self.known[source, prefix]

    def complete_sequences(self) -> list:
        return [p for p in self.prefixes if len(p) == self.length or (p and p[-1] == self.eos)]

    def log_q(self, source: int, prefix: tuple, recent_tokens: int = -1) -> Tensor:
        """log q(prefix | source); its gradient reaches the last `recent_tokens` tokens only (−1: all)."""
        terms = [self.logits(source, prefix[:k]).log_softmax(-1)[token] for k, token in enumerate(prefix)]
        kept = len(terms) if recent_tokens < 0 else recent_tokens
        terms = [t if k >= len(terms) - kept else t.detach() for k, t in enumerate(terms)]
        return torch.stack(terms).sum() if terms else torch.zeros((), dtype=torch.float64)

    def exact_batch(self, parts: int) -> tuple:
        """(sequences, sources) in which each sequence stands in proportion to q(x | source)."""
        sequences, sources = [], []
        for source in range(self.sources):
            for sequence in self.complete_sequences():
                times = self.log_q(source, sequence).exp().item() * parts**self.length
                assert abs(times - round(times)) < 1e-6
                sequences += [sequence] * round(times)
                sources += [source] * round(times)
        return sequences, torch.tensor(sources)
