"""Criterion `residual_nce`: noise-contrastive estimation of a residual energy (Deng et al. 2020, Eq. 3)."""
import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import FairseqDataclass
from fairseq.distributed.utils import get_data_parallel_world_size
from fairseq.logging import metrics
from omegaconf import II

from fairseq_earm.criterions.training_clock import watch_gradient
from fairseq_earm.ebm.nce import nce_logits, residual_nce_loss
from fairseq_earm.errors import UsageError

# Sums over a batch, beside fairseq's own; every worker reports all of them in every update.
KEYS = (
    "nce_negatives",
    "nce_correct_data",
    "nce_correct_negatives",
    "nce_energy_data",
    "nce_energy_negatives",
    "nce_weights",
)
# exp(−E) of a sample counts as exp of this at most: sums over all samples of an interval stay finite in float64.
MAX_LOG_WEIGHT = 600.0
DIVERGED = "training has diverged; lower --lr or --clip-norm and go on from the last checkpoint"


@dataclass
class ResidualNceConfig(FairseqDataclass):
    """What `--criterion residual_nce` takes."""

    nce_negatives_per_positive: int = field(
        default=1,
        metadata={
            "help": "samples of the base model drawn for every sequence of the data. --batch-size and --max-tokens bound the data "
            "alone: in a pass the energy network reads 1 + N times as many sequences"
        },
    )
    label_smoothing: float = field(
        default=0.0,
        metadata={
            "help": "probability with which a label is taken for wrong; above 0 the energy is no longer a log ratio at its optimum"
        },
    )
    fp16: bool = II("common.fp16")
    amp: bool = II("common.amp")


@register_criterion("residual_nce", dataclass=ResidualNceConfig)
class ResidualNceCriterion(FairseqCriterion):
    """Logistic loss of an energy network that tells data from samples of a frozen base model.

    For tasks that say what the network reads: `task.sequences(sample)` (B, L) the data, `task.negatives(sample, ν,
    training=…)` (ν·B, L') samples of the base model, both right-padded with `task.energy_pad`. Data and samples go
    through the network in one forward pass. Sample size is the number of sequences of the data.

    Raises:
        UsageError: another kind of task, settings out of range, and energies that are not finite: of several workers in
            training all raise it, once they know each other's gradients.
    """

    def __init__(self, task, cfg):
        super().__init__(task)
        _check(task, cfg)
        self.cfg = cfg
        self.task = task
        task.prepare_negatives(cfg.nce_negatives_per_positive)
        # In half precision fairseq's loss scaler takes a batch that is not finite for an overflow, and skips it.
        self.guarded = not (cfg.fp16 or cfg.amp)
        if self.guarded and get_data_parallel_world_size() > 1:
            watch_gradient(task, self._judge)

    def forward(self, model, sample, reduce=True):
        """Loss in nats, sample size and logging output of one batch."""
        count = self.cfg.nce_negatives_per_positive
        data = self.task.sequences(sample)
        negatives = self.task.negatives(sample, count, training=model.training)
        energies = model(src_tokens=_stack(data, negatives, self.task.energy_pad))
        bad = int((~energies.detach().isfinite()).sum()) if self.guarded else 0
        energy_data, energy_noise = energies.split([data.size(0), negatives.size(0)])
        loss = residual_nce_loss(
            energy_data, energy_noise, noise_per_data=count, label_smoothing=self.cfg.label_smoothing
        )
        if bad:
            loss = self._spoilt(loss, f"{bad} of {energies.numel()} energies", model.training)
        log = _log(loss, energy_data, energy_noise, count)
        log.update(sample_size=data.size(0), nsentences=data.size(0), ntokens=sample["ntokens"])
        return loss, data.size(0), log

    def _spoilt(self, loss, what: str, training: bool):
        """One worker ends here. Of several, the others would wait for this one's gradient: so it gives one, of no numbers."""
        if training and get_data_parallel_world_size() > 1:
            return loss * math.nan
        raise UsageError(f"--criterion residual_nce: {what} are not finite, {DIVERGED}")

    def _judge(self, norm, optimizer):
        if not bool(torch.isfinite(norm).all()):
            raise UsageError(f"--criterion residual_nce: the gradient of all workers together is not finite, {DIVERGED}")
        return norm

    @classmethod
    def reduce_metrics(cls, logging_outputs) -> None:
        """Aggregate logging outputs of all workers: the loss per sequence of the data in base 2, energies in nats."""
        keys = ("loss", *KEYS)  # tensors on the device, and nothing else
        sums = [sum(torch.as_tensor(log.get(key, 0.0)).double() for log in logging_outputs) for key in keys]
        total = dict(zip(keys, torch.stack(sums).tolist()))  # one transfer from the device
        data, noise = float(sum(log.get("sample_size", 0) for log in logging_outputs)), total["nce_negatives"]
        metrics.log_scalar("loss", total["loss"] / (data or math.nan) / math.log(2), data, round=3)
        if noise == 0:
            return
        energy_data, energy_noise = total["nce_energy_data"] / data, total["nce_energy_negatives"] / noise
        metrics.log_scalar("nce_accuracy_data", total["nce_correct_data"] / data, data, round=4)
        metrics.log_scalar("nce_accuracy_negatives", total["nce_correct_negatives"] / noise, noise, round=4)
        metrics.log_scalar("nce_energy_data", energy_data, data, round=3)
        metrics.log_scalar("nce_energy_negatives", energy_noise, noise, round=3)
        metrics.log_scalar("nce_energy_gap", energy_noise - energy_data, data, round=4)
        metrics.log_scalar("nce_self_normalisation", total["nce_weights"] / noise, noise, round=3)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        """They can: every worker reports the same scalars in every update."""
        return True


def _log(loss, energy_data, energy_noise, count: int) -> dict:
    """Sums over one batch as float64 scalars; `nce_weights` is that of exp(−E) over the samples."""
    energy_data, energy_noise = energy_data.detach().double(), energy_noise.detach().double()
    values = (
        torch.ones_like(energy_noise),
        nce_logits(energy_data, count).gt(0),
        nce_logits(energy_noise, count).le(0),
        energy_data,
        energy_noise,
        (-energy_noise).clamp_max(MAX_LOG_WEIGHT).exp(),
    )
    return {"loss": loss.detach().double(), **{key: value.double().sum() for key, value in zip(KEYS, values)}}


def _stack(data, negatives, pad: int):
    """(B + ν·B, L) data above samples, padded to one length."""
    length = max(data.size(1), negatives.size(1))
    return torch.cat([F.pad(tokens, (0, length - tokens.size(1)), value=pad) for tokens in (data, negatives)])


def _check(task, cfg) -> None:
    if not hasattr(task, "prepare_negatives"):
        raise UsageError(
            f"--criterion residual_nce: {type(task).__name__} has no base model to draw from; use --task "
            "residual_language_modeling or residual_translation"
        )
    if cfg.nce_negatives_per_positive < 1:
        raise UsageError(f"--nce-negatives-per-positive {cfg.nce_negatives_per_positive}: give at least 1")
    if not 0 <= cfg.label_smoothing < 0.5:
        raise UsageError(f"--label-smoothing {cfg.label_smoothing}: give a probability of at least 0 and below 0.5")
