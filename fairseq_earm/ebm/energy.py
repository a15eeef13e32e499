"""From logits to energies: everything E-ARM needs of a softmax layer is two numbers per step.

Wang et al., "Your Autoregressive Generative Model Can be Better If You Treat It as an Energy-Based One":
a softmax fixes its logits only up to an offset, and that free offset is the model's own energy (Eqs. 4, 5).
"""
from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from fairseq_earm.ebm.loss_head import token_statistics


class TokenEnergies(NamedTuple):
    """What one decoder pass says about the tokens of its targets.

    Both tensors are (B, T), in nats, float32 or wider.

    Attributes:
        logsumexp: log of the softmax's normaliser at each step, given the prefix before that step.
        target_logit: the logit of the target token at each step.
    """

    logsumexp: Tensor
    target_logit: Tensor

    @property
    def nll(self) -> Tensor:
        """(B, T) negative log-likelihood of each target token under the softmax."""
        return self.logsumexp - self.target_logit

    @property
    def phi(self) -> Tensor:
        """(B, T) energy of each target token, its negated logit (Eq. 4)."""
        return -self.target_logit


def token_energies(logits: Tensor, target: Tensor) -> TokenEnergies:
    """Read the energies of `target` off `logits`, with one logsumexp.

    Args:
        logits: (B, T, V) of any floating dtype; half precision is widened to float32.
        target: (B, T) token indices; padded positions must hold a valid index and are masked by the caller.
    """
    return TokenEnergies(*token_statistics(logits, target, mean=False)[:2])


def last_step(mask: Tensor) -> Tensor:
    """(B,) index of the last real step of each row of `mask` (B, T); 0 for a row without one."""
    steps = torch.arange(1, mask.size(1) + 1, device=mask.device)
    return (mask * steps).amax(1).sub(1).clamp_min(0)


def log_mu(logsumexp: Tensor, mask: Tensor) -> Tensor:
    """(B,) log μ(x): the logsumexp at each sequence's last step (Eq. 4).

    p_θ(x) = q(x) · μ(x) / Z, so relative to the softmax q the residual energy of a whole sequence is −log μ(x).
    """
    return logsumexp.gather(1, last_step(mask).unsqueeze(1)).squeeze(1)


def widen(logits: Tensor) -> Tensor:
    """Logits in float32 or wider: energies and weights live on a log scale that half precision cannot resolve."""
    return logits if logits.dtype == torch.float64 else logits.float()


def smoothed_nll(energies: TokenEnergies, mean_logit: Optional[Tensor], vocabulary: int, epsilon: float) -> Tensor:
    """(B, T) label-smoothed NLL as in fairseq: ε/(V − 1) on every other token, from what is already at hand.

    Args:
        energies: (B, T).
        mean_logit: (B, T) mean of all logits at each step; not needed without smoothing.
        vocabulary: V, the number of logits.
        epsilon: label smoothing; 0 gives the plain NLL.
    """
    if epsilon == 0:
        return energies.nll
    each = epsilon / (vocabulary - 1)
    over_all_tokens = vocabulary * (energies.logsumexp - mean_logit)
    return (1 - epsilon - each) * energies.nll + each * over_all_tokens
