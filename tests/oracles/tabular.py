"""A tiny autoregressive model whose every distribution can be written down, and E-ARM's exact objective on it.

Its parameters are one row of logits per source and prefix, the most general model there is. At the drawn parameters
all conditional probabilities are multiples of 1/4 (the logits' offsets, which carry the energy, are arbitrary), so that
a batch in which every sequence stands q(x)·4^L times *is* the distribution q: estimators over it have no noise.
"""
from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from fairseq_earm.ebm.energy import TokenEnergies, token_energies

EOS = 0


class TabularModel:
    """Sequences over `vocabulary` tokens (0 is end-of-sentence), ended by it or cut at `length` tokens."""

    def __init__(self, vocabulary: int = 3, length: int = 3, sources: int = 2, seed: int = 0):
        self.vocabulary, self.length, self.sources = vocabulary, length, sources
        self.prefixes = [
            prefix
            for size in range(length + 1)
            for prefix in itertools.product(range(vocabulary), repeat=size)
            if EOS not in prefix[:-1]
        ]
        self.row = {key: i for i, key in enumerate(itertools.product(range(sources), self.prefixes))}
        generator = torch.Generator().manual_seed(seed)
        quarters = [p for p in itertools.product(range(1, 4), repeat=vocabulary) if sum(p) == 4]
        chosen = torch.randint(len(quarters), (len(self.row),), generator=generator)
        conditional = torch.tensor([quarters[i] for i in chosen], dtype=torch.float64) / 4
        offsets = torch.randn(len(self.row), 1, generator=generator, dtype=torch.float64)
        self.table = (conditional.log() + offsets).requires_grad_()

    def is_complete(self, prefix: tuple) -> bool:
        return len(prefix) == self.length or (prefix and prefix[-1] == EOS)

    def complete_sequences(self) -> list:
        return [prefix for prefix in self.prefixes if self.is_complete(prefix)]

    def logits(self, source: int, prefix: tuple) -> Tensor:
        return self.table[self.row[source, prefix]]

    def log_q(self, source: int, prefix: tuple, recent_tokens: int = -1) -> Tensor:
        """log q(prefix | source); its gradient reaches the last `recent_tokens` tokens only (−1: all)."""
        terms = [self.logits(source, prefix[:k]).log_softmax(-1)[token] for k, token in enumerate(prefix)]
        kept = len(terms) if recent_tokens < 0 else recent_tokens
        terms = [t if k >= len(terms) - kept else t.detach() for k, t in enumerate(terms)]
        return torch.stack(terms).sum() if terms else torch.zeros((), dtype=torch.float64)

    def exact_batch(self) -> tuple:
        """(sequences, sources) in which each sequence stands in proportion to q(x | source), sources equally often."""
        sequences, sources = [], []
        for source in range(self.sources):
            for sequence in self.complete_sequences():
                times = self.log_q(source, sequence).exp().item() * 4**self.length
                assert abs(times - round(times)) < 1e-9
                sequences += [sequence] * round(times)
                sources += [source] * round(times)
        return sequences, torch.tensor(sources)

    def energies(self, sequences: list, sources, *, post: bool = False) -> tuple:
        """TokenEnergies (R, T) of sequences, and their mask; with `post` one step more, after the last token."""
        steps = max(map(len, sequences)) + post
        rows, target, mask = [], [], []
        for sequence, source in zip(sequences, map(int, sources)):
            read = len(sequence) + post
            rows.append([self.row[source, sequence[:k]] for k in range(read)] + [0] * (steps - read))
            target.append(list(sequence) + [0] * (steps - len(sequence)))
            mask.append([k < read for k in range(steps)])
        energies = token_energies(self.table[torch.tensor(rows)], torch.tensor(target))
        if post:
            inside = torch.arange(steps) < torch.tensor([len(s) for s in sequences]).unsqueeze(1)
            energies = TokenEnergies(energies.logsumexp, torch.where(inside, energies.target_logit, energies.logsumexp))
        return energies, torch.tensor(mask)


def log_unnormalized(model: TabularModel, source: int, prefix: tuple, recent_tokens: int, post: bool) -> Tensor:
    """log of q(x_<k) exp(z_k[x_k]), Eq. 4; with `post` log of q(x) exp(logsumexp one step after x)."""
    if post:
        return model.log_q(source, prefix, recent_tokens) + model.logits(source, prefix).logsumexp(-1)
    past = model.log_q(source, prefix[:-1], recent_tokens)
    return past + model.logits(source, prefix[:-1])[prefix[-1]]


def exact_objective(
    model: TabularModel, data: list, data_sources, *, recent_tokens=-1, energy_steps="all", normalizer="batch"
) -> Tensor:
    """Σ over data rows and steps of −log P_θ(x_≤k), by summing over every sequence there is (Eq. 6)."""
    log_z = _ExactLogZ(model, recent_tokens, energy_steps)
    total = torch.zeros((), dtype=torch.float64)
    for sequence, source in zip(data, map(int, data_sources)):
        ends = range(1, len(sequence) + 1) if energy_steps == "all" else [len(sequence)]
        groups = tuple(range(model.sources)) if normalizer == "batch" else (source,)
        for k in ends:
            value = log_unnormalized(model, source, sequence[:k], recent_tokens, energy_steps == "post")
            total = total - value + log_z(groups, k)
    return total


class _ExactLogZ:
    """log Z of step k over the given sources, by summing over every prefix of k tokens, or every complete sequence."""

    def __init__(self, model: TabularModel, recent_tokens: int, energy_steps: str):
        self.model, self.recent_tokens, self.energy_steps = model, recent_tokens, energy_steps
        self.known = {}

    def __call__(self, sources: tuple, k: int) -> Tensor:
        if self.energy_steps == "all":
            support = [prefix for prefix in self.model.prefixes if len(prefix) == k]
        else:
            support, k = self.model.complete_sequences(), 0
        if (sources, k) not in self.known:
            terms = [
                log_unnormalized(self.model, source, prefix, self.recent_tokens, self.energy_steps == "post")
                for source in sources
                for prefix in support
            ]
            self.known[sources, k] = torch.stack(terms).logsumexp(0) - math.log(len(sources))
        return self.known[sources, k]


def gradient(loss: Tensor, model: TabularModel) -> Tensor:
    """Gradient with respect to the model's table."""
    return torch.autograd.grad(loss, model.table, allow_unused=True)[0]
