"""What an energy could learn: how well another language model's own log-ratio to the base tells text from the base's samples.

    log_ratio.py DATA BASE.pt OTHER.pt [--sequences 500]

E = log P_base − log P_other is the energy whose joint model is the other language model itself. Its NCE loss and accuracy
stand beside those in an energy's training log.
"""
from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from fairseq_earm.cli.common import text_dictionary, text_task  # noqa: E402
from fairseq_earm.ebm.nce import residual_nce_loss  # noqa: E402
from fairseq_earm.sampling.base_lm import load_base_lm  # noqa: E402
from fairseq_earm.sampling.blocks import load_blocks  # noqa: E402
from fairseq_earm.sampling.continuation import ContinuationSampler, score_continuations  # noqa: E402
from fairseq_earm.sampling.layout import prefix_continuation  # noqa: E402

PREFIX, LENGTH, ROWS = 40, 64, 50


def log_ratio(data: str, base_path: str, other_path: str, sequences: int, prefix: int = PREFIX, length: int = LENGTH) -> dict:
    """NCE loss in bits (2 is chance) and accuracies of the log-ratio on evenly spaced validation sequences, one sample for each."""
    dictionary = text_dictionary(data)
    task = text_task(dictionary, data)
    base, other = (load_base_lm(path, task, flag="checkpoint", sequence_length=length).model for path in (base_path, other_path))
    blocks = load_blocks(f"{data}/valid", dictionary, sequence_length=length, break_mode="none")
    count = min(sequences, len(blocks))
    text = torch.stack([blocks[number * len(blocks) // count] for number in range(count)])
    sampler, generator = ContinuationSampler(dictionary, length - prefix), torch.Generator().manual_seed(1)

    def sample(rows):
        return prefix_continuation(rows[:, :prefix], sampler(base, rows[:, :prefix], generator=generator).tokens)

    def energies(tokens):
        settings = {"pad": dictionary.pad(), "eos": dictionary.eos()}
        scores = [[score_continuations(m, part, prefix, **settings).sum(1) for part in tokens.split(ROWS)] for m in (base, other)]
        return torch.cat(scores[0]) - torch.cat(scores[1])

    of_text, of_samples = energies(text), energies(torch.cat([sample(rows) for rows in text.split(ROWS)]))
    return {
        "nce_loss": residual_nce_loss(of_text, of_samples).item() / count / math.log(2),
        "nce_accuracy_data": (of_text < 0).float().mean().item(),
        "nce_accuracy_negatives": (of_samples > 0).float().mean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="prepare.sh's bin/")
    parser.add_argument("base", help="checkpoint")
    parser.add_argument("other", help="checkpoint")
    parser.add_argument("--sequences", type=int, default=500)
    args = parser.parse_args()
    print(" | ".join(f"{name} {value:.4f}" for name, value in log_ratio(args.data, args.base, args.other, args.sequences).items()))


if __name__ == "__main__":
    main()
