"""Next-token probabilities of a joint model P_LM · exp(−E), the future marginalised (Deng et al. 2020, Appendix A.1)."""
from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor


class NextToken(NamedTuple):
    """Estimated next-token distribution over K given tokens, which sums to one over them.

    Attributes:
        probability: (K,).
        standard_error: (K,) of each probability, by linearisation; 0 where there was one completion, which shows no spread.
    """

    probability: Tensor
    standard_error: Tensor


def next_token(base_log_probs: Tensor, neg_energies: Tensor) -> NextToken:
    """P(v | x_<t) ∝ P_LM(v | x_<t) · E[exp(−E(x_<t, v, rest))], the rest drawn from the base model.

    Args:
        base_log_probs: (K,) log P_LM(v | x_<t); a constant added to all of them changes nothing.
        neg_energies: (K, N) −E of N completions behind each token, drawn independently. N = 1 is exact where the token
            is the last one of its sequence, and nothing was drawn.
    """
    base, values = base_log_probs.double(), neg_energies.double()
    count = values.size(1)
    log_means = values.logsumexp(1) - math.log(count)
    probability = (base + log_means).softmax(0)
    # exp(−E) in units of its own mean, so that nothing overflows.
    relative = (values - log_means.unsqueeze(1)).exp()
    variance = relative.var(1, unbiased=count > 1) / count
    # d log p_v = dm_v / m_v − Σ_u p_u dm_u / m_u, the means m_u being independent.
    log_variance = (1 - 2 * probability) * variance + (probability**2 * variance).sum()
    error = probability * log_variance.clamp_min(0).sqrt()
    return NextToken(probability, error)
