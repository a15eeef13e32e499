"""Every size, flag and learning rate of the demonstration, in one place."""
from __future__ import annotations

from typing import List, NamedTuple

from anagrams import HALF

PREFIX, LENGTH = HALF, 2 * HALF + 1  # end-of-line is a token
# Without a buffer: a thread that still fills one when a short training ends can abort the whole process.
OPTIMIZER = [
    "--data-buffer-size", "0",
    "--optimizer", "adam", "--adam-betas", "(0.9, 0.98)", "--clip-norm", "1", "--lr-scheduler", "polynomial_decay",
    "--cpu", "--log-format", "json", "--log-interval", "20", "--no-progress-bar", "--no-epoch-checkpoints", "--num-workers", "0",
    "--no-save-optimizer-state",
]


class Size(NamedTuple):
    """How much of everything.

    Attributes:
        train, valid, test: lines.
        base_updates, energy_updates: of 256 and of 128 lines.
        exact: first halves of the test set for which everything is enumerated.
        samples: of each line for log Z, and of each first half by the models.
        seeds: of the energies.
    """

    train: int
    valid: int
    test: int
    base_updates: int
    energy_updates: int
    exact: int
    samples: int
    seeds: tuple


FULL = Size(20_000, 500, 250, 500, 600, 25, 1000, (1, 2, 3))
QUICK = Size(400, 40, 40, 10, 5, 3, 20, (1,))

ENERGIES = {
    "unit": [
        "--arch", "unit_tiny", "--decoder-embed-dim", "64", "--decoder-ffn-embed-dim", "128",
    ],
    "bit": [
        "--arch", "bit_tiny", "--encoder-embed-dim", "64", "--encoder-ffn-embed-dim", "128", "--max-positions", "32",
    ],
}


def base_flags(size: Size) -> List[str]:
    """A language model that is too small for the text."""
    return [
        "--task", "language_modeling", "--criterion", "cross_entropy", "--arch", "transformer_lm_residual_tiny",
        "--decoder-layers", "1", "--decoder-embed-dim", "16", "--decoder-ffn-embed-dim", "32", "--decoder-attention-heads", "2",
        "--dropout", "0", "--tokens-per-sample", str(LENGTH), "--sample-break-mode", "none",
        "--batch-size", "256", "--lr", "1e-2", "--warmup-updates", str(size.base_updates // 10), "--seed", "1",
        "--max-update", str(size.base_updates), "--total-num-update", str(size.base_updates), *OPTIMIZER,
    ]


def energy_flags(name: str, size: Size, base: str, seed: int) -> List[str]:
    """An energy network on the residual of the base model."""
    return [
        "--task", "residual_language_modeling", "--criterion", "residual_nce", "--base-lm", base, *ENERGIES[name],
        "--prefix-length", str(PREFIX), "--sequence-length", str(LENGTH), "--dropout", "0", "--batch-size", "128",
        "--nce-negatives-per-positive", "2", "--lr", "2e-3", "--warmup-updates", str(size.energy_updates // 10),
        "--max-update", str(size.energy_updates), "--total-num-update", str(size.energy_updates), "--seed", str(seed), *OPTIMIZER,
    ]
