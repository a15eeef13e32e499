"""The loss head, forward and backward: fairseq's label-smoothed cross-entropy against what E-ARM's criterion reads.

    loss_head.py [--tokens 4000] [--vocabulary 10000 40000] [--dim 512] [--rows 512] [--rounds 5] [--threads 1]

Ours also yields the energies; fairseq's would need another logsumexp for them.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from fairseq.criterions.label_smoothed_cross_entropy import label_smoothed_nll_loss

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from timing import compare, device, machine, markdown  # noqa: E402

from fairseq_earm.ebm.energy import TokenEnergies, smoothed_nll  # noqa: E402
from fairseq_earm.ebm.loss_head import projected_statistics, token_statistics  # noqa: E402

EPSILON = 0.1


def fairseqs(logits, target):
    """As the stock criterion does it."""
    log_probs = F.log_softmax(logits, -1, dtype=torch.float32)
    return label_smoothed_nll_loss(log_probs, target, EPSILON)[0]


def ours(statistics, vocabulary):
    """From what a loss head says."""
    energies = TokenEnergies(statistics.logsumexp, statistics.target_logit)
    return smoothed_nll(energies, statistics.mean_logit, vocabulary, EPSILON).sum()


def from_logits(tokens: int, vocabulary: int) -> dict:
    """Both, from logits that are there."""
    logits = torch.randn(tokens, vocabulary, device=device(), requires_grad=True)
    target = torch.randint(vocabulary, (tokens,), device=device())
    losses = {
        "fairseq, from logits": lambda: fairseqs(logits, target),
        "one gradient buffer": lambda: ours(token_statistics(logits, target), vocabulary),
    }
    return {name: _backward(loss, [logits]) for name, loss in losses.items()}


def from_states(tokens: int, vocabulary: int, dim: int, rows: int) -> dict:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[10000, 40000])
    parser.add_argument("--dim", type=int, default=512, help="of the hidden states")
    parser.add_argument("--rows", type=int, default=512, help="--earm-loss-rows")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for vocabulary in args.vocabulary:
        for variants in (from_logits(args.tokens, vocabulary), from_states(args.tokens, vocabulary, args.dim, args.rows)):
            costs = compare(variants, args.rounds)
            first = next(iter(costs.values()))
            for name, cost in costs.items():
                share = f"{cost.megabytes / first.megabytes:.0%}" if first.megabytes else "-"
                rows.append([f"{vocabulary:,}", name, f"{cost.seconds:.3f}", f"{cost.ratio:.2f}", f"{cost.megabytes:,.0f}", share])
    print(f"{args.tokens:,} tokens, states of {args.dim}; {machine()}; median of {args.rounds} rounds\n")
    print(markdown(["vocabulary", "loss head", "seconds", "of fairseq's", "MB", "of fairseq's"], rows))


if __name__ == "__main__":
    main()
