"""Importance weights of sequences drawn from the softmax q towards the energy-based model (Eqs. 13, 14)."""
from __future__ import annotations

import math
from typing import NamedTuple, Optional

import torch
from torch import Tensor


class StepStatistics(NamedTuple):
    """What normalisers, count matching and baselines must know of a batch, step by step; float64, detached.

    G is the number of normalisers: 1 per batch or one per source.

    Attributes:
        log_sum: (G, S) log of the sum of exp(lse) over the negatives alive, −inf where none is.
        log_square_sum: (G, S) the same of exp(2 · lse).
        negatives: (G, S) number of negatives alive.
        data: (G, S) number of data rows alive.
        later, now: (G, L, T) counts for `baseline.history_baseline`, one for each of L lags; L is 0 without a baseline.
    """

    log_sum: Tensor
    log_square_sum: Tensor
    negatives: Tensor
    data: Tensor
    later: Tensor
    now: Tensor

    @property
    def log_normalizer(self) -> Tensor:
        """(G, T) log-mean-exp of lse over the negatives alive, −inf where none is."""
        return self.log_sum - self.negatives.clamp_min(1).log()

    @property
    def relative_ess(self) -> Tensor:
        """(G, T) effective sample size as a share of the negatives alive, (mean w)² / mean w² (Kish)."""
        return (2 * self.log_sum - self.log_square_sum).exp() / self.negatives.clamp_min(1)

    def up_to(self, steps: int) -> StepStatistics:
        """Those of so many steps: cut, or padded with statistics of nothing. The baseline's counts stay as they are."""
        rows, own = self.data.shape
        nothing = no_statistics(max(0, steps - own), self.data.device)
        fitted = (torch.cat([each[:, :steps], none.expand(rows, -1)], 1) for each, none in zip(self[:4], nothing[:4]))
        return StepStatistics(*fitted, *self[4:])


def step_statistics(
    logsumexp: Tensor, mask: Tensor, groups: Tensor, data_mask: Tensor, data_groups: Tensor, num_groups: int
) -> StepStatistics:
    """Statistics of negatives with logsumexp (R, T), alive where `mask` is True, and of data rows (B, T) alive.

    The counts of a baseline are left empty.

    Args:
        groups, data_groups: (R,), (B,) normaliser of each row, in [0, num_groups).
    """
    values = logsumexp.detach().double()  # in single precision 2 · lse would lose what a weight is made of
    sums = (grouped_log_sum_exp(factor * values, mask, groups, num_groups) for factor in (1, 2))
    counts = (group_counts(mask, groups, num_groups), group_counts(data_mask, data_groups, num_groups))
    empty = values.new_zeros(num_groups, 0, mask.size(1))
    return StepStatistics(*sums, *(count.double() for count in counts), empty, empty)


def join_statistics(parts: StepStatistics) -> StepStatistics:
    """Statistics of a batch, with G = 1, from those of the W parts that it is made of, with G = W."""
    sums = (each.logsumexp(0, keepdim=True) for each in parts[:2])
    return StepStatistics(*sums, *(each.sum(0, keepdim=True) for each in parts[2:]))


def no_statistics(steps: int, device=None) -> StepStatistics:
    """(1, T) statistics of a batch of nothing, without a baseline."""
    nothing = torch.zeros(1, steps, dtype=torch.float64, device=device)
    empty = nothing.new_zeros(1, 0, steps)
    return StepStatistics(nothing - math.inf, nothing - math.inf, nothing, nothing, empty, empty)


def grouped_log_sum_exp(values: Tensor, mask: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """Log of the sum of exp(values) over the rows of each group that are alive, step by step.

    Args:
        values, mask: (R, T).
        groups: (R,) group of each row, in [0, num_groups).
    Returns:
        (num_groups, T), −inf where a group has no row alive.
    """
    values = values.masked_fill(~mask, -math.inf)
    steps = values.size(1)
    index = groups.unsqueeze(1).expand(-1, steps)
    peak = values.new_full((num_groups, steps), -math.inf).scatter_reduce(0, index, values.detach(), "amax")
    reference = peak.masked_fill(peak.isneginf(), 0.0)
    total = values.new_zeros(num_groups, steps).index_add(0, groups, (values - reference[groups]).exp())
    # The gradient of log 0 would be NaN, also where nobody asks for it.
    return total.masked_fill(total == 0, 1.0).log().masked_fill(total == 0, -math.inf) + reference


def group_counts(mask: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """(num_groups, T) number of rows of each group that are alive at each step."""
    counts = torch.zeros(num_groups, mask.size(1), dtype=torch.long, device=mask.device)
    return counts.index_add(0, groups, mask.long())


def step_log_normalizer(logsumexp: Tensor, mask: Tensor) -> Tensor:
    """(T,) log normaliser of each step: log-mean-exp over the rows alive at it, −inf where none is."""
    alive = mask.sum(0).clamp_min(1).to(logsumexp.dtype)
    return logsumexp.masked_fill(~mask, -math.inf).logsumexp(0) - alive.log()


def moving_log_normalizer(previous: Optional[Tensor], batch: Tensor, decay: float) -> Tensor:
    """Exponential moving average of normalisers, taken on exp and kept as log.

    Args:
        previous: (T',) the average so far, None at the first batch. Steps it has not seen start at the batch's value.
        batch: (T,) this batch's log normaliser, −inf at steps that no row reached: those keep the average.
        decay: weight of the past, 0 < decay < 1.
    Returns:
        (max(T, T'),) log normaliser.
    """
    if previous is None:
        return batch
    length = max(previous.numel(), batch.numel())
    past = torch.full((length,), -math.inf, dtype=batch.dtype, device=batch.device)
    now = past.clone()
    past[: previous.numel()] = previous.to(batch)
    now[: batch.numel()] = batch
    mixed = torch.logaddexp(past + math.log(decay), now + math.log1p(-decay))
    return torch.where(past.isneginf(), now, torch.where(now.isneginf(), past, mixed))


def log_importance_weights(logsumexp: Tensor, mask: Tensor, *, log_normalizer: Optional[Tensor] = None) -> Tensor:
    """(R, T) log w_k = logsumexp_k − log normaliser of step k (Eq. 14), −inf where `mask` is False; detached.

    Args:
        logsumexp: (R, T) of the sampled rows.
        mask: (R, T), True on the steps at which a row is alive.
        log_normalizer: (T,) or (R, T); by default the log-mean-exp over the rows alive at each step.
    """
    logsumexp = logsumexp.detach()
    if log_normalizer is None:
        log_normalizer = step_log_normalizer(logsumexp, mask)
    return (logsumexp - log_normalizer.detach()).masked_fill(~mask, -math.inf)


def effective_sample_size(log_weights: Tensor, dim: int = 0) -> Tensor:
    """Kish's effective sample size (Σw)² / Σw² along `dim`: between 1 and the number of weights, 0 where none is alive."""
    log_size = 2 * log_weights.logsumexp(dim) - (2 * log_weights).logsumexp(dim)
    return torch.where(log_weights.isneginf().all(dim), torch.zeros_like(log_size), log_size.exp())


def resample(log_weights: Tensor, generator: Optional[torch.Generator] = None) -> Tensor:
    """Order candidates by successive draws without replacement, each with probability proportional to its weight.

    The first column is the one draw of Algorithm 1 (Deng et al. 2020); further columns serve n-best lists.
    Perturbing log-weights by Gumbel noise and sorting is that sequence of draws.

    Args:
        log_weights: (..., N), unnormalised; −inf is never drawn before a finite one.
    Returns:
        (..., N) indices.
    """
    uniform = torch.rand(log_weights.shape, generator=generator, dtype=torch.float64, device=log_weights.device)
    gumbel = -(-uniform.clamp_min(torch.finfo(torch.float64).tiny).log()).log()
    return (log_weights.double() + gumbel).argsort(-1, descending=True)
