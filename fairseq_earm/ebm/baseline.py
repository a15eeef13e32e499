"""A baseline for the history in E-ARM's negative phase: it removes most of the history's noise, none of its signal.

The history part of the negative phase weighs the score ∇nll_l of every drawn token x_l by

    c_l = Σ_{k=l+1}^{l+m} w_k · (data rows alive at k / negatives alive at k) · 1{row alive at k}.

Under q the score has mean zero given x_<l, for end-of-sentence as for any other token. So a baseline b_l that is known
before x_l is drawn may be subtracted from c_l, in *every* row alive at l, those that end at l included. With energies
on all steps it is what the coefficients average to,

    b_l = Σ_k (data rows alive at k) / (negatives alive at l that could reach k),

the data rows counted whether or not a negative happened to reach k: that depends on x_l, and would bias the mean. With
one energy a row, D data rows and N negatives, it is D/N · the share of the data rows alive at l whose energy step comes
within the m steps after l.
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_earm.ebm.weights import StepStatistics, group_counts


def history_counts(
    settings, data_mask: Tensor, model_mask: Tensor, groups: tuple, num_groups: int, limits: Optional[Tensor]
) -> dict:
    """The counts `later` and `now` of `StepStatistics`, each (G', L, T) float64; L = 0 without a baseline.

    Args:
        settings: `contrast.EarmSettings`.
        data_mask, model_mask: (B, T), (R, T) True on real tokens, padded to one length.
        groups: (B,), (R,) normaliser of each row.
        limits: (R,) the most steps that each negative could have had; None: no row was cut.
    """
    lags = _lags(settings, data_mask.size(1))
    if settings.energy_steps != "all":
        return _window_counts(settings, data_mask, lags)
    data_group, model_group = groups
    rows = group_counts(data_mask, data_group, num_groups)
    later = [_shift(rows, lag) for lag in range(1, lags + 1)]
    now = [
        group_counts(model_mask & _reaches(limits, model_mask.size(1), lag, model_mask.device), model_group, num_groups)
        for lag in range(1, lags + 1)
    ]
    return {"later": _stack(later, rows), "now": _stack(now, rows)}


def history_baseline(
    settings, statistics: StepStatistics, steps: int, limits: Optional[Tensor], groups: Tensor
) -> Tensor:
    """(R, steps) the baseline b of each negative's tokens, float64; meaningful where the row is alive.

    Args:
        settings: `contrast.EarmSettings`.
        statistics: of all rows that share a normaliser.
        limits: as for `history_counts`.
        groups: (R,) normaliser of each negative.
    """
    each = (statistics.later / statistics.now.clamp_min(1))[:, :, :steps]
    if settings.energy_steps != "all":
        share = statistics.data / statistics.negatives.clamp_min(1)
        return (share.unsqueeze(2) * each).sum(1)[groups]
    total = torch.zeros(groups.numel(), steps, dtype=torch.float64, device=groups.device)
    for lag in range(1, each.size(1) + 1):
        total = total + each[groups, lag - 1] * _reaches(limits, steps, lag, groups.device)
    return total


def _window_counts(settings, data_mask: Tensor, lags: int) -> dict:
    """Data rows alive at each step, and of these the ones whose energy step comes within the window after it.

    Both are of the whole batch, also where each source has its own normaliser: the one data row of a source says next
    to nothing about how long its samples are.
    """
    alive = group_counts(data_mask, torch.zeros(data_mask.size(0), dtype=torch.long, device=data_mask.device), 1)
    beyond = _shift(alive, 1)
    within = beyond - _shift(alive, lags + 1)
    now = beyond if settings.energy_steps == "post" else alive  # there the mask is one step longer than the tokens
    kept = min(lags, 1)
    return {"later": _stack([within] * kept, alive), "now": _stack([now] * kept, alive)}


def _lags(settings, steps: int) -> int:
    if not settings.baseline:
        return 0
    most = max(steps - 1, 0)
    return most if settings.recent_tokens < 0 else min(settings.recent_tokens, most)


def _reaches(limits: Optional[Tensor], steps: int, lag: int, device) -> Tensor:
    """(R or 1, steps) whether a row alive at a step may be alive `lag` steps later."""
    if limits is None:
        return torch.ones(1, steps, dtype=torch.bool, device=device)
    return limits.unsqueeze(1) >= torch.arange(1 + lag, steps + 1 + lag, device=device)


def _shift(counts: Tensor, lag: int) -> Tensor:
    """(G, T) the counts `lag` steps later; none beyond the last step."""
    return F.pad(counts, (0, lag))[:, lag:]


def _stack(counts: list, like: Tensor) -> Tensor:
    """(G, L, T) of a list of L counts (G, T)."""
    if not counts:
        return torch.zeros(like.size(0), 0, like.size(1), dtype=torch.float64, device=like.device)
    return torch.stack(counts, 1).double()
