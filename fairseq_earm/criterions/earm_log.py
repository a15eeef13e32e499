"""What E-ARM says in the log: sums from each worker's batch, averages over the interval."""
from __future__ import annotations

from typing import Callable, Optional

import torch
from fairseq.logging import metrics
from torch import Tensor

from fairseq_earm.criterions.training_clock import watch_gradient
from fairseq_earm.ebm.objectives import EarmLoss
from fairseq_earm.meter_state import MeterState
from fairseq_earm.sampling.samples import Samples

# Every worker reports every key in every update, as tensors: otherwise fairseq's summing over workers falls apart.
KEYS = (
    "earm_batches",
    "earm_loss",
    "earm_steps",
    "earm_dv",
    "earm_energy_data",
    "earm_energy_negatives",
    "earm_ess",
    "earm_max_weight",
    "earm_negatives",
    "earm_negative_tokens",
    "earm_truncated",
    "earm_distinct",
    "earm_sampling_seconds",
)


def log_entries(like: Tensor, values: Optional[dict] = None) -> dict:
    """All of `KEYS` as float64 scalars on the device of `like`; 0 where `values` says nothing."""
    entries = {key: torch.zeros((), dtype=torch.float64, device=like.device) for key in KEYS}
    for key, value in (values or {}).items():
        entries[key] += value
    return entries


def earm_values(earm: EarmLoss, samples: Samples, seconds: float) -> dict:
    """Sums over one batch; those of weights are in units of their step's mean weight."""
    return {
        "earm_batches": 1,
        "earm_loss": earm.loss.detach(),
        "earm_steps": earm.data_steps,
        "earm_dv": earm.dv,
        "earm_energy_data": earm.energy_data,
        "earm_energy_negatives": earm.energy_negatives,
        "earm_ess": earm.relative_ess,
        "earm_max_weight": earm.log_weights.amax().exp(),
        "earm_negatives": samples.mask.size(0),
        "earm_negative_tokens": samples.mask.sum(),
        "earm_truncated": samples.truncated.sum(),
        "earm_distinct": samples.distinct,
        "earm_sampling_seconds": seconds,
    }


def control_values(terms: Tensor, steps: Tensor) -> dict:
    """The same of a control without negatives.

    Args:
        terms: its loss.
        steps: (B, S) True on the data's steps that are in it.
    """
    return {"earm_batches": 1, "earm_loss": terms.detach(), "earm_steps": steps.sum()}


def watch_clipping(task, active: Callable[[], bool], clip_norm: float) -> None:
    """Log the gradient's norm, and the share of updates in which it was clipped, of the updates with E-ARM alone.

    Under --earm-every they are N times as large as the others, so an average over both kinds describes neither.
    """

    def log_norm(norm: Tensor, optimizer) -> Tensor:
        if active():
            metrics.log_scalar("earm_gnorm", norm, priority=400, round=3)
            if clip_norm > 0:
                metrics.log_scalar("earm_clip", 100.0 * (norm > clip_norm), priority=500, round=1)
        return norm

    watch_gradient(task, log_norm, scaled=True)


def reduce_earm_metrics(logging_outputs: list) -> None:
    """Log E-ARM's figures of an update in which it was active: means in nats per step, shares from 0 to 1."""
    sums = [sum(torch.as_tensor(log.get(key, 0.0)).double() for log in logging_outputs) for key in KEYS]
    total = dict(zip(KEYS, torch.stack(sums).tolist()))  # one transfer from the device
    batches, steps, negatives = total["earm_batches"], total["earm_steps"], total["earm_negatives"]
    if batches == 0:
        return
    metrics.log_scalar("earm_loss", total["earm_loss"] / max(steps, 1), steps, round=3)
    if negatives > 0:
        _log_energies(total)
        metrics.log_scalar("earm_ess", total["earm_ess"] / max(steps, 1), steps, round=3)
        metrics.log_scalar("earm_max_weight", total["earm_max_weight"] / batches, batches, round=2)
        metrics.log_scalar("earm_negative_length", total["earm_negative_tokens"] / negatives, negatives, round=2)
        metrics.log_scalar("earm_truncated", total["earm_truncated"] / negatives, negatives, round=4)
        metrics.log_scalar("earm_distinct", total["earm_distinct"] / negatives, negatives, round=4)
        metrics.log_scalar("earm_sampling_seconds", total["earm_sampling_seconds"] / batches, batches, round=3)
    skipped = MeterState().get("skipped_updates")
    if skipped is not None:
        metrics.log_scalar("earm_skipped_updates", skipped, weight=0)


def _log_energies(total: dict) -> None:
    steps = max(total["earm_steps"], 1)
    data, negatives = total["earm_energy_data"] / steps, total["earm_energy_negatives"] / steps
    dv = total["earm_dv"] / steps
    metrics.log_scalar("earm_energy_data", data, steps, round=3)
    metrics.log_scalar("earm_energy_negatives", negatives, steps, round=3)
    metrics.log_scalar("earm_energy_gap", negatives - data, steps, round=4)
    metrics.log_scalar("earm_dv", dv, steps, round=4)
    metrics.log_scalar("earm_log_normalizer", -data - dv, steps, round=3)
