"""Perplexity of a base model and of the joint model P(x | prefix) ∝ P_base(x | prefix) exp(−E(prefix, x)), with bounds.

One set of the base's completions per sequence and position serves everything: those of the prefix estimate log Z
(Deng et al. 2020, Theorem 2) for each number of samples asked for, and with those of later positions every step (Eq. 5),
the completions of t tokens being step t's numerator and step t + 1's denominator. The last step is exact: every last
token is tried.

All in nats, in float64 once the networks have spoken. The random numbers of a sequence depend on the seed, its number and
the position alone: whatever else is measured, and however often the run is interrupted, its figures are the same.
"""
from __future__ import annotations

import hashlib
import math
from typing import Any, List, NamedTuple, Optional, Protocol, Sequence

import torch
from torch import Tensor

from fairseq_earm.ebm.partition import (
    LogPartition, exact_log_partition, joint_log_prob, log_partition, stepwise_log_probs,
)
from fairseq_earm.errors import UsageError


class LastToken(NamedTuple):
    """Every token a sequence could end with: (V,) its log-probability under the base, and the energy of that sequence."""

    log_probs: Tensor
    energies: Tensor


class JointModel(Protocol):
    """What is asked of a base model and an energy. `item` is one sequence with its prefix, in the model's own form."""

    def base_log_probs(self, item: Any) -> Tensor:
        """(T,) log-probability of each token after the prefix."""

    def energy(self, item: Any) -> Tensor:
        """() energy of the sequence."""

    def sampled_energies(self, item: Any, known: int, samples: int, seed: int) -> Tensor:
        """(samples,) energies of sequences that the base makes of the prefix and the first `known` tokens after it."""

    def last_token(self, item: Any) -> LastToken:
        """All sequences that differ from this one in the last token at most. Only called per step."""


def measure_sequence(
    model: JointModel, item: Any, *, index: int, samples: Sequence[int] = (), per_step: bool = False, seed: int = 1
) -> dict:
    """All that is measured of one sequence, as plain numbers.

    Args:
        index: the sequence's number in its corpus.
        samples: numbers of samples of 2 or more, ascending; each takes the first of one set. Empty: the base alone.
        per_step: each step under the joint model too, from as many samples as the largest number.
    Returns:
        index; base, the T log-probabilities; with `samples` also energy and log_z, [lower, upper] for each number of
        samples; with `per_step` also steps, [lower, upper] of the T log-probabilities under the joint model.
    Raises:
        UsageError: a log-probability or an energy that is not finite.
    """
    base = _finite(model.base_log_probs(item), index, "log-probability under the base model")
    record = {"index": index, "base": base.tolist()}
    if not samples:
        return record

    def completions(known: int) -> Tensor:
        energies = model.sampled_energies(item, known, samples[-1], sequence_seed(seed, index, known))
        return -_finite(energies, index, f"energy (a sample after {known} tokens)")

    own = -_finite(model.energy(item), index, "energy")
    from_prefix = completions(0)
    log_z = [log_partition(from_prefix[:n]) for n in samples]
    record.update(energy=-own.item(), log_z=torch.stack([torch.stack(pair) for pair in log_z]).tolist())
    if per_step:
        last = model.last_token(item)
        exact = exact_log_partition(last.log_probs.cpu(), -_finite(last.energies, index, "energy (of another last token)"))
        between = [log_partition(completions(known)) for known in range(1, base.numel() - 1)]
        # The continuation of one token has no estimate in it: its log Z is the exact one.
        estimates = [log_z[-1], *between, exact] if base.numel() > 1 else [exact]
        bounds = [torch.stack(pair) for pair in zip(*estimates, LogPartition(own, own))]
        record["steps"] = torch.stack(stepwise_log_probs(base, LogPartition(*bounds)), 1).tolist()
    return record


def _finite(values: Tensor, index: int, what: str) -> Tensor:
    """The values in float64 on the CPU."""
    values = values.double().cpu()
    wrong = values[~values.isfinite()]
    if wrong.numel():
        raise UsageError(
            f"sequence {index}: its {what} is {wrong[0].item()}, where a finite number is needed: look for a checkpoint from "
            "before the training diverged, and try --dtype float32"
        )
    return values


def sequence_seed(seed: int, index: int, known: int) -> int:
    """A seed of 63 bits for the completions of a sequence's first `known` tokens."""
    digest = hashlib.sha256(f"{seed} {index} {known}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def summarize(records: Sequence[dict], samples: Sequence[int] = (), *, per_step: bool = False) -> dict:
    """Corpus figures from the records of `measure_sequence`, one or more, all measured with the same settings.

    NLLs are nats per token over all tokens. A gain is the base's NLL minus the upper one of the joint model, with its
    standard error over sequences (None for a single one).

    Returns:
        sequences; tokens; base: {nll, perplexity}; with `samples` also joint: for each number of samples {samples,
        nll_lower, nll_upper, perplexity_lower, perplexity_upper, log_z_lower, log_z_upper, gain, gain_standard_error};
        with `per_step` also steps: for each {step, base} and, with `samples`, {lower, upper}, all perplexities.
    """
    lengths = torch.tensor([len(record["base"]) for record in records], dtype=torch.float64)
    base = torch.tensor([math.fsum(record["base"]) for record in records], dtype=torch.float64)
    nll = -(base.sum() / lengths.sum()).item()
    summary = {
        "sequences": len(records),
        "tokens": int(lengths.sum()),
        "base": {"nll": nll, "perplexity": perplexity(nll)},
    }
    if samples:
        energy = torch.tensor([record["energy"] for record in records], dtype=torch.float64)
        log_z = torch.tensor([record["log_z"] for record in records], dtype=torch.float64)
        summary["joint"] = [
            {"samples": n, **_joint_figures(base, energy, LogPartition(*log_z[:, number].unbind(1)), lengths)}
            for number, n in enumerate(samples)
        ]
    if per_step:
        summary["steps"] = _step_figures(records)
    return summary


def perplexity(nll: float) -> float:
    """exp of nats per token; infinite where that is more than a float holds."""
    return math.exp(nll) if nll < 709 else math.inf


def _joint_figures(base: Tensor, energy: Tensor, log_z: LogPartition, lengths: Tensor) -> dict:
    """One row of `summarize`'s joint figures, from (S,) tensors of the sequences."""
    joint = joint_log_prob(base, energy, log_z)
    nll_lower, nll_upper = (-(value.sum() / lengths.sum()).item() for value in (joint.upper, joint.lower))
    gains = joint.lower - base
    gain = (gains.sum() / lengths.sum()).item()
    return {
        "nll_lower": nll_lower,
        "nll_upper": nll_upper,
        "perplexity_lower": perplexity(nll_lower),
        "perplexity_upper": perplexity(nll_upper),
        "log_z_lower": log_z.lower.mean().item(),
        "log_z_upper": log_z.upper.mean().item(),
        "gain": gain,
        "gain_standard_error": _standard_error(gains - gain * lengths, lengths),
    }


def _standard_error(residuals: Tensor, lengths: Tensor) -> Optional[float]:
    """Of the ratio Σ gains / Σ lengths over sequences, from gains − ratio · lengths."""
    count = lengths.numel()
    if count == 1:
        return None
    return math.sqrt(count / (count - 1) * (residuals**2).sum().item()) / lengths.sum().item()


def _step_figures(records: Sequence[dict]) -> List[dict]:
    rows = [{"step": step + 1, "base": _mean_perplexity(values)} for step, values in enumerate(zip(*_column(records, "base")))]
    if "steps" not in records[0]:
        return rows
    for row, bounds in zip(rows, zip(*_column(records, "steps"))):
        log_lower, log_upper = zip(*bounds)
        row.update(lower=_mean_perplexity(log_upper), upper=_mean_perplexity(log_lower))
    return rows


def _column(records: Sequence[dict], key: str) -> List[list]:
    return [record[key] for record in records]


def _mean_perplexity(log_probs: Sequence[float]) -> float:
    return perplexity(-math.fsum(log_probs) / len(log_probs))
