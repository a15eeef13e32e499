"""The loss head, forward and backward: fairseq's label-smoothed cross-entropy against what E-ARM's criterion reads.

Ours also yields the energies; fairseq's would need another logsumexp for them.
"""
from __future__ import annotations

from functools import partial
from typing import Callable, Dict, List, Sequence

import torch
import torch.nn.functional as F
from fairseq.criterions.label_smoothed_cross_entropy import label_smoothed_nll_loss
from tables import Row, Setting, Table
from timing import Variant, compare, device, in_own_process

from fairseq_earm.ebm.energy import TokenEnergies, smoothed_nll
from fairseq_earm.ebm.loss_head import projected_statistics, token_statistics

EPSILON = 0.1
QUICK = {"tokens": 2000, "vocabularies": [10000]}
FULL = {"tokens": 4000, "vocabularies": [10000, 40000]}


def fairseqs(logits, target):
    """As the stock criterion does it."""
    log_probs = F.log_softmax(logits, -1, dtype=torch.float32)
    return label_smoothed_nll_loss(log_probs, target, EPSILON)[0]


def ours(statistics, vocabulary):
    """From what a loss head says."""
    energies = TokenEnergies(statistics.logsumexp, statistics.target_logit)
    return smoothed_nll(energies, statistics.mean_logit, vocabulary, EPSILON).sum()


def from_logits(tokens: int, vocabulary: int) -> Dict[str, Variant]:
    """Both, from logits that are there."""
    logits = torch.randn(tokens, vocabulary, device=device(), requires_grad=True)
    target = torch.randint(vocabulary, (tokens,), device=device())
    losses = {
        "fairseq, from logits": lambda: fairseqs(logits, target),
        "one gradient buffer": lambda: ours(token_statistics(logits, target), vocabulary),
    }
    return {name: _backward(loss, [logits]) for name, loss in losses.items()}


def from_states(tokens: int, vocabulary: int, dim: int, rows: int) -> Dict[str, Variant]:
    """Both, from hidden states and the output embedding."""
    hidden = torch.randn(tokens, dim, device=device(), requires_grad=True)
    weight = (torch.randn(vocabulary, dim, device=device()) / dim**0.5).requires_grad_()
    target = torch.randint(vocabulary, (tokens,), device=device())
    losses = {
        "fairseq, from states": lambda: fairseqs(F.linear(hidden, weight), target),
        "one gradient buffer": lambda: ours(token_statistics(F.linear(hidden, weight), target), vocabulary),
        f"{rows} rows at once": lambda: ours(projected_statistics(hidden, weight, target, rows=rows), vocabulary),
    }
    return {name: _backward(loss, [hidden, weight]) for name, loss in losses.items()}


def _backward(loss, parameters):
    def run() -> None:
        loss().backward()
        for parameter in parameters:
            parameter.grad = None

    return run


def rows(setting: Setting, tokens: int = 4000, vocabularies: Sequence[int] = (10000, 40000), dim: int = 512, block: int = 256) -> List[Row]:
    """Forward and backward of each loss head, from logits and from states, each of the two in a process of its own.

    Args:
        tokens, vocabularies, dim: steps of a batch, symbols of each vocabulary, size of the states.
        block: `--earm-loss-rows`.
    """
    found: List[Row] = []
    for vocabulary in vocabularies:
        for variants in (partial(from_logits, tokens, vocabulary), partial(from_states, tokens, vocabulary, dim, block)):
            found += [{"tokens": tokens, "vocabulary": vocabulary, **row} for row in in_own_process(_compared, variants, setting.rounds)]
    return found


def _compared(variants: Callable[[], Dict[str, Variant]], rounds: int) -> List[Row]:
    costs = compare(variants(), rounds)
    first = next(iter(costs.values()))
    return [
        {
            "loss head": name, "seconds": cost.seconds, "time of fairseq's": cost.ratio,
            "MB": cost.megabytes, "memory of fairseq's": cost.megabytes / first.megabytes if first.megabytes else None,
        }
        for name, cost in costs.items()
    ]


TABLE = Table(
    "The loss head",
    {
        "tokens": ",", "vocabulary": ",", "loss head": "", "seconds": ".3f", "time of fairseq's": ".2f", "MB": ",.0f",
        "memory of fairseq's": ".0%",
    },
    rows, QUICK, FULL,
)
