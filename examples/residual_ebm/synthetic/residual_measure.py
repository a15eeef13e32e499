"""An energy beside what it should be: everything that the language's known distribution allows to say exactly.

For some first halves of the test set every second half is enumerated. The optimal energy is log P_LM − log P_data (Deng et
al. 2020, Theorem 1); log Z of the learnt one is an exact sum, and so are both divergences. The base can also say what no
line says (two ends of line, unknown words); it does so with a probability that is reported, and its log Z misses that part.
"""
from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import List, Tuple

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[2])]

import anagrams  # noqa: E402
from residual_settings import PREFIX  # noqa: E402

CHUNK = 2000


def read_lines(path: Path, count: int) -> List[Tuple[str, ...]]:
    return [tuple(line.split()) for line in path.read_text().splitlines()[:count]]


class Enumeration:
    """All continuations of one first half under the data's distribution, the base model and the energy.

    Attributes:
        log_data, log_base, energy: (N,) in float64, nats; N second halves in the order of `anagrams.second_halves()`.
    """

    def __init__(self, base, energy, dictionary, first, halves):
        words = torch.tensor([[dictionary.index(word) for word in half] for half in halves])
        prefix = torch.tensor([dictionary.index(word) for word in first]).expand(len(halves), -1)
        tokens = torch.cat([prefix, words, words.new_full((len(halves), 1), dictionary.eos())], 1)
        self.log_data = torch.tensor([anagrams.log_probability(first, half) for half in halves]).double()
        self.log_base, self.energy = _scores(base, energy, dictionary, tokens)

    def figures(self) -> dict:
        """KL divergences, log Z, and how far the energy is from the optimal one, weighted by the data's probabilities."""
        data = self.log_data.exp()
        log_z = (self.log_base - self.energy).logsumexp(0)
        log_joint = self.log_base - self.energy - log_z
        optimal = self.log_base - self.log_data
        return {
            "log_z": float(log_z),
            "base_covers": float(self.log_base.exp().sum()),
            "entropy": float(-(data * self.log_data).sum()),
            "kl_base": float((data * (self.log_data - self.log_base)).sum()),
            "kl_joint": float((data * (self.log_data - log_joint)).sum()),
            "correlation": _correlation(self.energy, optimal, data),
            "deviation": math.sqrt(_variance(self.energy - optimal, data)),
            "deviation_of_zero": math.sqrt(_variance(optimal, data)),
            "self_normalization": float(log_z.exp()),
        }


@torch.no_grad()
def _scores(base, energy, dictionary, tokens: Tensor) -> Tuple[Tensor, Tensor]:
    from fairseq_earm.sampling.continuation import score_continuations

    log_base, energies = [], []
    for part in tokens.split(CHUNK):
        log_base.append(score_continuations(base, part, PREFIX, pad=dictionary.pad(), eos=dictionary.eos()).double().sum(1))
        energies.append(energy(part).double())
    return torch.cat(log_base), torch.cat(energies)


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    return (weights * values).sum() / weights.sum()


def _variance(values: Tensor, weights: Tensor) -> float:
    return float(_mean((values - _mean(values, weights)) ** 2, weights))


def _correlation(one: Tensor, other: Tensor, weights: Tensor) -> float:
    covariance = _mean((one - _mean(one, weights)) * (other - _mean(other, weights)), weights)
    return float(covariance) / math.sqrt(max(_variance(one, weights) * _variance(other, weights), 1e-300))


def measure(data: Path, text: Path, base_path: str, energy_path: str, count: int) -> dict:
    """Figures of every enumerated first half, and one of them in full for the picture."""
    from fairseq import checkpoint_utils

    import fairseq_earm  # noqa: F401  (so that any checkpoint can be read)

    overrides = {"data": str(data)}
    (base,), _, task = checkpoint_utils.load_model_ensemble_and_task([base_path], arg_overrides=overrides)
    (energy,), _, _ = checkpoint_utils.load_model_ensemble_and_task([energy_path], arg_overrides=overrides)
    halves, found, points = anagrams.second_halves(), [], []
    for line in read_lines(text / "test.txt", count):
        enumeration = Enumeration(base.eval(), energy.eval(), task.source_dictionary, line[:PREFIX], halves)
        found.append(enumeration.figures())
        points = points or _likely(enumeration)
    return {"halves": found, "points": points}


def _likely(enumeration: Enumeration, number: int = 400) -> List[Tuple[float, float]]:
    """(optimal, learnt) energy, less log Z, of the continuations that are likeliest in the data or under the base."""
    weight = torch.maximum(enumeration.log_data, enumeration.log_base)
    optimal = enumeration.log_base - enumeration.log_data
    learnt = enumeration.energy + (enumeration.log_base - enumeration.energy).logsumexp(0)
    return [(float(optimal[i]), float(learnt[i])) for i in weight.topk(min(number, len(weight))).indices]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "text", "base", "energy", "output"):
        parser.add_argument(name)
    parser.add_argument("--count", type=int, default=50, help="first halves to enumerate")
    args = parser.parse_args()
    numbers = measure(Path(args.data), Path(args.text), args.base, args.energy, args.count)
    Path(args.output).write_text(json.dumps(numbers))


if __name__ == "__main__":
    main()
