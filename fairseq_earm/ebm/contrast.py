"""Data against samples of the model, step by step: the quantities that every objective is computed from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_earm.ebm.baseline import history_baseline, history_counts
from fairseq_earm.ebm.energy import TokenEnergies, last_step
from fairseq_earm.ebm.weights import StepStatistics, log_importance_weights, no_statistics, step_statistics

ENERGY_STEPS = ("all", "last", "post")
NORMALIZERS = ("batch", "source")


@dataclass(frozen=True)
class EarmSettings:
    """Which terms an E-ARM objective has; it holds for every batch of a run.

    Attributes:
        recent_tokens: m, the tokens of history that gradients reach (2 in the paper; 0 none, −1 all).
        energy_steps: "all" puts an energy on every step (the paper), "last" on each row's last step, "post" on the
            step after it: then the tensors hold that step too (`sampling.scoring.with_post_step`).
        normalizer: "batch" normalises weights over all negatives, "source" over those of one data row.
        rao_blackwell: replace the negatives' φ by its expectation given the prefix, −lse ("all" only).
        baseline: subtract `baseline.history_baseline` from the history of the negatives.
    Raises:
        ValueError: for unknown or contradictory settings.
    """

    recent_tokens: int = 2
    energy_steps: str = "all"
    normalizer: str = "batch"
    rao_blackwell: bool = False
    baseline: bool = False

    def __post_init__(self):
        if self.energy_steps not in ENERGY_STEPS:
            raise ValueError(f"energy_steps must be one of {', '.join(ENERGY_STEPS)}, not {self.energy_steps!r}")
        if self.normalizer not in NORMALIZERS:
            raise ValueError(f"normalizer must be one of {', '.join(NORMALIZERS)}, not {self.normalizer!r}")
        if self.rao_blackwell and self.energy_steps != "all":
            # Given that a step is the last, its token is known: its expectation is itself.
            raise ValueError('rao_blackwell goes with energy_steps "all" only')


class Scored(NamedTuple):
    """What the model says about sequences.

    Attributes:
        energies: (R, T).
        mask: (R, T) True on real tokens, end-of-sentence included.
        past: (R, T) what the history sums up instead of the NLL, such as label-smoothed NLL; None for the NLL.
    """

    energies: TokenEnergies
    mask: Tensor
    past: Optional[Tensor] = None


class Steps(NamedTuple):
    """The steps of one phase that carry the energy: history H, φ and lse, each (R, S), and their mask."""

    history: Tensor
    phi: Tensor
    logsumexp: Tensor
    mask: Tensor


class Contrast(NamedTuple):
    """Data (B, S) against negatives (R, S). G is the number of normalisers: 1 per batch, or one per data row.

    Attributes:
        data, negatives: their steps.
        data_group, negative_group: (B,), (R,) normaliser of each row.
        statistics: (G, S) of the negatives and the data.
        log_normalizer: (G, S), detached.
        log_weights: (R, S) log importance weights, −inf where a row is not alive; detached.
        data_mask: (B, S) data steps that have a negative to be contrasted with.
        share: (G, S) data rows per negative, which matches the counts of both phases.
        baseline: scalar of value 0 whose gradient has mean 0; every objective with a history subtracts it from its
            negative phase.
    """

    data: Steps
    negatives: Steps
    data_group: Tensor
    negative_group: Tensor
    statistics: StepStatistics
    log_normalizer: Tensor
    log_weights: Tensor
    data_mask: Tensor
    share: Tensor
    baseline: Tensor


def history(nll: Tensor, mask: Tensor, recent_tokens: int) -> Tensor:
    """(B, T) H_k: the NLL of the `recent_tokens` tokens before step k (0: none, −1: all of them), without k itself."""
    nll = nll.masked_fill(~mask, 0.0)
    steps = nll.size(1)
    if recent_tokens < 0 or recent_tokens >= steps:
        return F.pad(nll.cumsum(1)[:, :-1], (1, 0))
    shifted = [F.pad(nll, (lag, 0))[:, :steps] for lag in range(1, recent_tokens + 1)]
    return torch.stack(shifted).sum(0) if shifted else torch.zeros_like(nll)


def steps_with_energy(settings: EarmSettings, scored: Scored) -> Steps:
    """The steps that carry the energy: all of them, or the last masked step of each row."""
    energies, mask, past = scored
    past = history(energies.nll if past is None else past, mask, settings.recent_tokens)
    if settings.energy_steps == "all":
        return Steps(past, energies.phi, energies.logsumexp, mask)
    last = last_step(mask).unsqueeze(1)
    pick = [each.gather(1, last) for each in (past, energies.phi, energies.logsumexp)]
    return Steps(*pick, mask.any(1, keepdim=True))


def contrast(
    settings: EarmSettings,
    data: Scored,
    negatives: Scored,
    *,
    sources: Optional[Tensor] = None,
    limits: Optional[Tensor] = None,
    log_normalizer: Optional[Tensor] = None,
    statistics: Optional[StepStatistics] = None,
) -> Contrast:
    """Put data (B, T) beside negatives (R, T').

    Args:
        sources: (R,) data row that each negative belongs to; needed for the normaliser "source".
        limits: (R,) the most steps that each negative could have had; None: no row was cut.
        log_normalizer: normaliser of each step, of at least as many as there are negatives for, to use in place of the
            batch's own, such as a moving average ("batch" only).
        statistics: `batch_statistics` of the whole that this batch is a part of, as on one of several workers ("batch"
            only). The parts' losses then add up to the loss of the whole.
    Raises:
        ValueError: arguments that contradict the settings.
    """
    if settings.normalizer == "source" and sources is None:
        raise ValueError('normalizer "source" needs sources, the data row of each negative')
    if settings.normalizer == "source" and (log_normalizer is not None or statistics is not None):
        raise ValueError('log_normalizer and statistics are those of a batch and do not go with normalizer "source"')
    groups = _groups(settings, data.mask, negatives.mask, sources)
    if statistics is None:
        statistics = batch_statistics(settings, data.mask, negatives, sources=sources, limits=limits)
    baseline = _baseline(settings, statistics, negatives, limits, groups[1])
    data_steps, model_steps = _same_length(steps_with_energy(settings, data), steps_with_energy(settings, negatives))
    if settings.rao_blackwell:
        model_steps = model_steps._replace(phi=-model_steps.logsumexp)
    statistics = statistics.up_to(data_steps.mask.size(1))
    return _weighted(data_steps, model_steps, groups, statistics, log_normalizer, baseline)


def _weighted(
    data: Steps, model: Steps, groups, statistics: StepStatistics, given: Optional[Tensor], baseline
) -> Contrast:
    data_group, model_group = groups
    log_normalizer = _log_normalizer(statistics, given).to(model.logsumexp.dtype)
    log_weights = log_importance_weights(model.logsumexp, model.mask, log_normalizer=log_normalizer[model_group])
    data_mask = data.mask & (statistics.negatives > 0)[data_group]
    share = (statistics.data / statistics.negatives.clamp_min(1)).to(log_weights.dtype)
    return Contrast(
        data, model, data_group, model_group, statistics, log_normalizer, log_weights, data_mask, share, baseline
    )


def batch_statistics(
    settings: EarmSettings,
    data_mask: Tensor,
    negatives: Scored,
    *,
    sources: Optional[Tensor] = None,
    limits: Optional[Tensor] = None,
    steps: Optional[int] = None,
) -> StepStatistics:
    """(G, S) what `contrast` must know of all the rows that share a normaliser.

    Args:
        data_mask: (B, T) True on the data's tokens.
        negatives, sources, limits: as for `contrast`.
        steps: the most steps of any part of the whole; by default those of this batch.
    """
    steps = max(data_mask.size(1), negatives.mask.size(1)) if steps is None else steps
    data_mask, model_mask = (_pad(mask, steps) for mask in (data_mask, negatives.mask))
    groups = _groups(settings, data_mask, model_mask, sources)
    num_groups = 1 if settings.normalizer == "batch" else data_mask.size(0)
    counts = history_counts(settings, data_mask, model_mask, groups, num_groups, limits)
    logsumexp, rows, alive = _pad(negatives.energies.logsumexp, steps), data_mask, model_mask
    if settings.energy_steps != "all":
        logsumexp = logsumexp.gather(1, last_step(model_mask).unsqueeze(1))
        rows, alive = data_mask.any(1, keepdim=True), model_mask.any(1, keepdim=True)
    data_group, model_group = groups
    return step_statistics(logsumexp, alive, model_group, rows, data_group, num_groups)._replace(**counts)


def empty_statistics(settings: EarmSettings, steps: int, device=None) -> StepStatistics:
    """(1, S) `batch_statistics` of a batch without rows, that is one part of a whole of so many steps."""
    nothing = torch.zeros(1, steps, dtype=torch.bool, device=device)
    groups = (torch.zeros(1, dtype=torch.long, device=device),) * 2
    counts = history_counts(settings, nothing, nothing, groups, 1, None)
    return no_statistics(steps if settings.energy_steps == "all" else 1, device)._replace(**counts)


def _baseline(settings: EarmSettings, statistics: StepStatistics, negatives: Scored, limits, groups: Tensor) -> Tensor:
    """Σ b · nll over the negatives' tokens, less its own value: only its gradient is wanted."""
    nll = negatives.energies.nll
    if not settings.baseline:
        return nll.new_zeros(())
    coefficients = history_baseline(settings, statistics, negatives.mask.size(1), limits, groups).to(nll.dtype)
    return masked_sum(coefficients * (nll - nll.detach()), negatives.mask)


def _groups(settings: EarmSettings, data_mask: Tensor, model_mask: Tensor, sources: Optional[Tensor]) -> tuple:
    """Group of every data row and of every negative: rows of one group share a normaliser."""
    rows = torch.arange(data_mask.size(0), device=data_mask.device)
    if settings.normalizer == "source":
        return rows, sources
    return torch.zeros_like(rows), torch.zeros(model_mask.size(0), dtype=torch.long, device=model_mask.device)


def _log_normalizer(statistics: StepStatistics, given: Optional[Tensor]) -> Tensor:
    """(G, S) the batch's own normaliser, or the one given, cut or padded to as many steps."""
    if given is None:
        return statistics.log_normalizer
    steps = statistics.data.size(1)
    return F.pad(given[:steps], (0, max(0, steps - given.numel()))).unsqueeze(0)


def _same_length(a: Steps, b: Steps) -> tuple:
    steps = max(a.mask.size(1), b.mask.size(1))
    return tuple(Steps(*(_pad(each, steps) for each in phase)) for phase in (a, b))


def _pad(values: Tensor, steps: int) -> Tensor:
    return F.pad(values, (0, steps - values.size(1)))


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of the values where the mask is True; what stands elsewhere, NaN included, has no part in it."""
    return values.masked_fill(~mask, 0.0).sum()
