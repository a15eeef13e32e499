"""The E-ARM objective: contrastive divergence of an autoregressive model against itself.

Wang et al., "Your Autoregressive Generative Model Can be Better If You Treat It as an Energy-Based One".
With z_k the logits at step k, lse_k = logsumexp(z_k), nll_k = lse_k − z_k[x_k], φ_k = −z_k[x_k] and the history
H_k = Σ_{l=k−m}^{k−1} nll_l, the model at step k is P_θ(x_≤k) ∝ q(x_<k) exp(−φ_k) (Eq. 4). Descending

    Σ_k mean over data (H_k + φ_k) − Σ_k mean over samples of q (w_k · (H_k + φ_k)),   w_k ∝ exp(lse_k) detached

descends Σ_k KL(P_data ‖ P_θ) (Eqs. 6–16): exactly so for the full history, m tokens of it otherwise.
"""
from __future__ import annotations

from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_earm.ebm.energy import TokenEnergies, last_step
from fairseq_earm.ebm.weights import StepStatistics, log_importance_weights, step_statistics

ENERGY_STEPS = ("all", "last", "post")
NORMALIZERS = ("batch", "source")


class EarmLoss(NamedTuple):
    """The E-ARM loss of one batch, in nats, and what it was made of.

    S is the number of steps that carry the energy: the larger of T and T' for `energy_steps="all"`, else 1. G is the number
    of normalisers: 1 per batch or one per source.

    Attributes:
        loss: positive_phase − negative_phase, a sum over data steps.
        positive_phase, negative_phase: Σ (H + φ) on data, Σ w (H + φ) on negatives, count-matched.
        log_weights: (R, S) log importance weights of the negatives, −inf where a row is not alive; detached.
        log_normalizer: (G, S) log normalisers that the weights were divided by; detached.
        dv: Σ over data steps of lse − log normaliser: the Donsker-Varadhan bound on what q misses; detached.
        energy_data, energy_negatives: Σ of −lse over data steps, and over negatives with the same counts; detached.
        relative_ess: Σ over data steps of the effective sample size of their weights, as a share of the negatives alive.
        data_steps: number of data steps in these sums.
    """

    loss: Tensor
    positive_phase: Tensor
    negative_phase: Tensor
    log_weights: Tensor
    log_normalizer: Tensor
    dv: Tensor
    energy_data: Tensor
    energy_negatives: Tensor
    relative_ess: Tensor
    data_steps: Tensor


class _Steps(NamedTuple):
    """The steps of one phase that carry the energy: history, φ and lse, each (R, S), and their mask."""

    history: Tensor
    phi: Tensor
    logsumexp: Tensor
    mask: Tensor


def history(nll: Tensor, mask: Tensor, recent_tokens: int) -> Tensor:
    """(B, T) H_k: the NLL of the `recent_tokens` tokens before step k (0: none, −1: all of them), without k itself."""
    nll = nll.masked_fill(~mask, 0.0)
    steps = nll.size(1)
    if recent_tokens < 0 or recent_tokens >= steps:
        return F.pad(nll.cumsum(1)[:, :-1], (1, 0))
    shifted = [F.pad(nll, (lag, 0))[:, :steps] for lag in range(1, recent_tokens + 1)]
    return torch.stack(shifted).sum(0) if shifted else torch.zeros_like(nll)


def nll_terms(
    positive: TokenEnergies,
    positive_mask: Tensor,
    *,
    recent_tokens: int = 2,
    energy_steps: str = "all",
    positive_history: Optional[Tensor] = None,
) -> Tensor:
    """Σ_k (H_k + nll_k) over the energy steps: the likelihood that E-ARM repeats, without energy (the control row).

    Arguments as for `earm_loss`.
    """
    data = _data_steps(positive, positive_mask, recent_tokens, energy_steps, positive_history)
    return _masked_sum(data.history + data.phi + data.logsumexp, data.mask)


def earm_loss(
    positive: TokenEnergies,
    positive_mask: Tensor,
    negative: TokenEnergies,
    negative_mask: Tensor,
    *,
    recent_tokens: int = 2,
    energy_steps: str = "all",
    normalizer: str = "batch",
    sources: Optional[Tensor] = None,
    log_normalizer: Optional[Tensor] = None,
    rao_blackwell: bool = False,
    positive_history: Optional[Tensor] = None,
    statistics: Optional[StepStatistics] = None,
) -> EarmLoss:
    """E-ARM's loss (Eqs. 6–16), count-matched: per step, the mean over alive negatives times the alive data rows.

    Data steps that no negative of their normaliser reaches have nothing to be contrasted with and are left out.

    Args:
        positive, positive_mask: energies of the data (B, T) and True on real tokens, end-of-sentence included.
        negative, negative_mask: the same for R samples of the model, (R, T').
        recent_tokens: m, the tokens of history that gradients reach (2 in the paper; 0 none, −1 all).
        energy_steps: "all" puts an energy on every step (the paper), "last" on each row's last step, "post" on the
            step after it: then the tensors hold that step too (`sampling.scoring.with_post_step`).
        normalizer: "batch" normalises weights over all negatives, "source" over those of one data row.
        sources: (R,) data row that each negative belongs to; needed for "source".
        log_normalizer: normaliser of each step, of at least as many as there are negatives for, to use in place of the
            batch's own, such as a moving average ("batch" only).
        rao_blackwell: replace the negatives' φ by its expectation given the prefix, −lse ("all" only).
        positive_history: (B, T) what the data's history sums instead of its NLL, such as label-smoothed NLL. The
            negatives keep their NLL: it is the score of q, and only that has mean zero under q.
        statistics: `batch_statistics` of the whole of which this batch is a part, on another worker each ("batch" only).
            The parts' losses then sum up to the loss of the whole.
    Raises:
        ValueError: for unknown or contradictory settings.
    """
    of_the_whole = log_normalizer is not None or statistics is not None
    _check(energy_steps, normalizer, sources, of_the_whole, rao_blackwell)
    data = _data_steps(positive, positive_mask, recent_tokens, energy_steps, positive_history)
    model = _energy_steps(negative, history(negative.nll, negative_mask, recent_tokens), negative_mask, energy_steps)
    if rao_blackwell:
        model = model._replace(phi=-model.logsumexp)
    data, model = _same_length(data, model)
    groups = _groups(data.mask, model.mask, normalizer, sources)
    if statistics is None:
        num_groups = 1 if normalizer == "batch" else data.mask.size(0)
        data_group, model_group = groups
        statistics = step_statistics(model.logsumexp, model.mask, model_group, data.mask, data_group, num_groups)
    statistics = statistics.up_to(data.mask.size(1))
    return _contrast(data, model, groups, statistics, _log_normalizer(statistics, log_normalizer))


def _contrast(data: _Steps, model: _Steps, groups: tuple, statistics: StepStatistics, log_normalizer: Tensor) -> EarmLoss:
    """Both phases, and what they were made of, given what the weights of the negatives are divided by and matched to."""
    data_group, model_group = groups
    log_normalizer = log_normalizer.to(model.logsumexp.dtype)
    log_weights = log_importance_weights(model.logsumexp, model.mask, log_normalizer=log_normalizer[model_group])
    data_mask = data.mask & (statistics.negatives > 0)[data_group]
    share = (statistics.data / statistics.negatives.clamp_min(1)).to(log_weights.dtype)

    positive_phase = _masked_sum(data.history + data.phi, data_mask)
    weights = log_weights.exp() * share[model_group]
    negative_phase = _masked_sum(weights * (model.history + model.phi), model.mask)
    return EarmLoss(
        positive_phase - negative_phase,
        positive_phase,
        negative_phase,
        log_weights,
        log_normalizer,
        dv=_masked_sum(data.logsumexp.detach() - log_normalizer[data_group], data_mask),
        energy_data=-_masked_sum(data.logsumexp.detach(), data_mask),
        energy_negatives=-_masked_sum(model.logsumexp.detach() * share[model_group], model.mask),
        relative_ess=_masked_sum(statistics.relative_ess[data_group], data_mask),
        data_steps=data_mask.sum(),
    )


def batch_statistics(
    positive_mask: Tensor, negative: TokenEnergies, negative_mask: Tensor, *, energy_steps: str = "all"
) -> StepStatistics:
    """(1, S) what `earm_loss` with normaliser "batch" must know of all batches that share one; arguments as there."""
    model = _energy_steps(negative, negative.logsumexp, negative_mask, energy_steps)
    data_mask = positive_mask if energy_steps == "all" else positive_mask.any(1, keepdim=True)
    steps = max(data_mask.size(1), model.mask.size(1))
    logsumexp, mask, data_mask = (F.pad(each, (0, steps - each.size(1))) for each in (model.logsumexp, model.mask, data_mask))
    data_group, model_group = _groups(data_mask, mask, "batch", None)
    return step_statistics(logsumexp, mask, model_group, data_mask, data_group, 1)


def _check(energy_steps, normalizer, sources, of_the_whole, rao_blackwell) -> None:
    if energy_steps not in ENERGY_STEPS:
        raise ValueError(f"energy_steps must be one of {', '.join(ENERGY_STEPS)}, not {energy_steps!r}")
    if normalizer not in NORMALIZERS:
        raise ValueError(f"normalizer must be one of {', '.join(NORMALIZERS)}, not {normalizer!r}")
    if normalizer == "source" and sources is None:
        raise ValueError('normalizer "source" needs sources, the data row of each negative')
    if normalizer == "source" and of_the_whole:
        raise ValueError('log_normalizer and statistics are those of a batch and do not go with normalizer "source"')
    if rao_blackwell and energy_steps != "all":
        # Given that a step is the last, its token is known: there is no expectation left to take.
        raise ValueError('rao_blackwell goes with energy_steps "all" only')


def _data_steps(
    positive: TokenEnergies, mask: Tensor, recent_tokens: int, energy_steps: str, positive_history: Optional[Tensor]
) -> _Steps:
    """The data's steps that carry the energy, with a history of NLL or of what was given in its place."""
    past = history(positive.nll if positive_history is None else positive_history, mask, recent_tokens)
    return _energy_steps(positive, past, mask, energy_steps)


def _energy_steps(energies: TokenEnergies, past: Tensor, mask: Tensor, energy_steps: str) -> _Steps:
    """Keep the steps that carry the energy: all of them, or the last masked step of each row."""
    if energy_steps == "all":
        return _Steps(past, energies.phi, energies.logsumexp, mask)
    last = last_step(mask).unsqueeze(1)
    pick = [t.gather(1, last) for t in (past, energies.phi, energies.logsumexp)]
    return _Steps(*pick, mask.any(1, keepdim=True))


def _same_length(a: _Steps, b: _Steps) -> tuple:
    steps = max(a.mask.size(1), b.mask.size(1))
    return tuple(_Steps(*(F.pad(t, (0, steps - t.size(1))) for t in phase)) for phase in (a, b))


def _groups(data_mask: Tensor, model_mask: Tensor, normalizer: str, sources: Optional[Tensor]) -> tuple:
    """Group of every data row and of every negative: rows of one group share a normaliser."""
    rows = torch.arange(data_mask.size(0), device=data_mask.device)
    if normalizer == "source":
        return rows, sources
    return torch.zeros_like(rows), torch.zeros(model_mask.size(0), dtype=torch.long, device=model_mask.device)


def _log_normalizer(statistics: StepStatistics, given: Optional[Tensor]) -> Tensor:
    """(G, S) the batch's own normaliser, or the one given, cut or padded to as many steps."""
    if given is None:
        return statistics.log_normalizer
    steps = statistics.data.size(1)
    return F.pad(given[:steps], (0, max(0, steps - given.numel()))).unsqueeze(0)


def _masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    return values.masked_fill(~mask, 0.0).sum()
