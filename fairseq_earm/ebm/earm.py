"""The E-ARM objective: contrastive divergence of an autoregressive model against itself.

Wang et al., "Your Autoregressive Generative Model Can be Better If You Treat It as an Energy-Based One".
With z_k the logits at step k, lse_k = logsumexp(z_k), nll_k = lse_k − z_k[x_k], φ_k = −z_k[x_k] and the history
H_k = Σ_{l=k−m}^{k−1} nll_l, the model at step k is P_θ(x_≤k) ∝ q(x_<k) exp(−φ_k) (Eq. 4). Descending

    Σ_k mean over data (H_k + φ_k) − Σ_k mean over samples of q (w_k · (H_k + φ_k)),   w_k ∝ exp(lse_k) detached

descends Σ_k KL(P_data ‖ P_θ) (Eqs. 6–16): exactly so for the full history, m tokens of it otherwise. Here is the loss
in one call; `contrast` and `objectives` hold its parts.
"""

from __future__ import annotations

from typing import Optional

from torch import Tensor

from fairseq_earm.ebm.contrast import EarmSettings, Scored, contrast, steps_with_energy
from fairseq_earm.ebm.energy import TokenEnergies
from fairseq_earm.ebm.objectives import EarmLoss, kl, likelihood
from fairseq_earm.ebm.weights import StepStatistics


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
    baseline: bool = False,
    limits: Optional[Tensor] = None,
    positive_history: Optional[Tensor] = None,
    statistics: Optional[StepStatistics] = None,
) -> EarmLoss:
    """E-ARM's loss (Eqs. 6–16), count-matched: per step, the mean over alive negatives times the alive data rows.

    Data steps that no negative of their normaliser reaches have nothing to be contrasted with and are left out.

    Args:
        positive, positive_mask: energies of the data (B, T) and True on real tokens, end-of-sentence included.
        negative, negative_mask: the same for R samples of the model, (R, T').
        recent_tokens, energy_steps, normalizer, rao_blackwell, baseline: see `contrast.EarmSettings`.
        sources, limits, log_normalizer, statistics: see `contrast.contrast`.
        positive_history: (B, T) what the data's history sums instead of its NLL, such as label-smoothed NLL. The
            negatives keep their NLL: it is the score of q, and only that has mean zero under q.
    Raises:
        ValueError: for unknown or contradictory settings.
    """
    settings = EarmSettings(recent_tokens, energy_steps, normalizer, rao_blackwell, baseline)
    data, negatives = Scored(positive, positive_mask, positive_history), Scored(negative, negative_mask)
    return kl(
        contrast(
            settings,
            data,
            negatives,
            sources=sources,
            limits=limits,
            log_normalizer=log_normalizer,
            statistics=statistics,
        )
    )


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
    settings, data = EarmSettings(recent_tokens, energy_steps), Scored(positive, positive_mask, positive_history)
    return likelihood(steps_with_energy(settings, data))
