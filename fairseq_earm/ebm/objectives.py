"""What may be descended for the energy, by name, and the controls that have everything of it but the energy.

A new objective is a function from `contrast.Contrast` to `EarmLoss`, entered in `OBJECTIVES`.
"""

from __future__ import annotations

from typing import Callable, Dict, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from fairseq_earm.ebm.contrast import Contrast, Steps, masked_sum
from fairseq_earm.ebm.weights import grouped_log_sum_exp


class EarmLoss(NamedTuple):
    """The loss of one batch, in nats, and what it was made of.

    S is the number of steps that carry the energy: the larger of T and T' for `energy_steps="all"`, else 1. G is the
    number of normalisers: 1 per batch or one per source.

    Attributes:
        loss: positive_phase − negative_phase, a sum over data steps.
        positive_phase, negative_phase: the data's terms and the negatives', count-matched.
        log_weights: (R, S) log importance weights of the negatives, −inf where a row is not alive; detached.
        log_normalizer: (G, S) log normalisers that the weights were divided by; detached.
        dv: Σ over data steps of lse − log normaliser: the Donsker-Varadhan bound on what q misses; detached.
        energy_data, energy_negatives: Σ of −lse over data steps, and over negatives with the same counts; detached.
        relative_ess: Σ over data steps of the effective sample size of their weights, as a share of the negatives
            alive.
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


def kl(found: Contrast) -> EarmLoss:
    """Σ_k KL(P_data ‖ P_θ) by contrastive divergence (Eq. 15): Σ (H + φ) on data − Σ w (H + φ) on negatives."""
    data, model = found.data, found.negatives
    weights = found.log_weights.exp() * found.share[found.negative_group]
    positive = masked_sum(data.history + data.phi, found.data_mask)
    negative = masked_sum(weights * (model.history + model.phi), model.mask)
    return _with_figures(found, positive, negative - found.baseline)


def nce(found: Contrast) -> EarmLoss:
    """Logistic regression of data against negatives at every step, with the energy's log ratio as its logit.

    With d data rows and n negatives alive at step k, t = lse − log Z_k, Z_k the mean of exp(lse) over these negatives,
    the loss is Σ softplus(log(n/d) − t) on data + Σ softplus(t − log(n/d)) on negatives, beside the likelihood terms of
    `likelihood`. It is bounded from below. For fixed q and many negatives its optimum is t = log P_data(x_<k) −
    log q(x_<k), both conditioned on being alive at k. Z_k is differentiated through: if it were held fixed, a shift of
    all lse would have a gradient, and lse would drift. Data steps that no negative reaches are left out, as in `kl`.
    """
    data, model, statistics = found.data, found.negatives, found.statistics
    log_sum = grouped_log_sum_exp(model.logsumexp, model.mask, found.negative_group, statistics.data.size(0))
    log_z = log_sum - statistics.negatives.clamp_min(1).log().to(log_sum.dtype)
    log_ratio = (statistics.negatives.clamp_min(1) / statistics.data.clamp_min(1)).log().to(log_sum.dtype)
    contrasted = model.mask & (statistics.data > 0)[found.negative_group]
    of_data = F.softplus(_logit(data, log_z, log_ratio, found.data_group, found.data_mask, sign=-1))
    of_negatives = F.softplus(_logit(model, log_z, log_ratio, found.negative_group, contrasted, sign=1))
    positive = likelihood(data._replace(mask=found.data_mask)) + masked_sum(of_data, found.data_mask)
    return _with_figures(found, positive, -masked_sum(of_negatives, contrasted))


def noise(found: Contrast) -> EarmLoss:
    """The control for `kl` that has its samples without its energy: all weights are 1, and φ becomes the NLL.

    Nothing then depends on the free offset of the logits. Under Rao-Blackwell the negatives' φ vanishes. On average,
    and as far as negatives are drawn from the q that is scored, it descends the likelihood of `likelihood`, given that
    each step is reached. Samples add their noise.
    """
    data, model = found.data, found.negatives
    positive = masked_sum(data.history + data.phi + data.logsumexp, found.data_mask)
    negative = masked_sum(found.share[found.negative_group] * (model.history + model.phi + model.logsumexp), model.mask)
    return _with_figures(found, positive, negative - found.baseline)


def likelihood(data: Steps) -> Tensor:
    """Σ_k (H_k + nll_k) over the data's energy steps: the likelihood that `kl` repeats, without energy or negatives."""
    return masked_sum(data.history + data.phi + data.logsumexp, data.mask)


def flat(data: Steps, strength: float) -> Tensor:
    """`likelihood` and a penalty on lse that varies over the data: strength · Σ_k d_k Var(lse_k), d_k rows alive at k.

    The control that keeps lse flat, which is what E-ARM does first, without any negative.
    """
    lse = data.logsumexp.masked_fill(~data.mask, 0.0)
    mean = lse.sum(0) / data.mask.sum(0).clamp_min(1)
    return likelihood(data) + strength * masked_sum((lse - mean) ** 2, data.mask)


OBJECTIVES: Dict[str, Callable[[Contrast], EarmLoss]] = {"kl": kl, "nce": nce}
CONTROLS = ("likelihood", "noise", "flat")
WITHOUT_NEGATIVES = ("likelihood", "flat")
# Version 0.1 had one control and stored True or False.
STORED_CONTROLS = {"True": "likelihood", "False": "none", "None": "none"}


def control_named(stored: object) -> str:
    """The control that a setting stands for: "none", or one of `CONTROLS`."""
    return STORED_CONTROLS.get(str(stored), str(stored))


def _logit(steps: Steps, log_z: Tensor, log_ratio: Tensor, groups: Tensor, mask: Tensor, *, sign: int) -> Tensor:
    """(R, S) ±(t − log(n/d)), 0 outside of the mask, where log Z may be infinite."""
    return sign * (steps.logsumexp - log_z[groups] - log_ratio[groups]).masked_fill(~mask, 0.0)


def _with_figures(found: Contrast, positive: Tensor, negative: Tensor) -> EarmLoss:
    """The loss of two phases, and the figures by which an energy is judged."""
    data, model, mask = found.data, found.negatives, found.data_mask
    return EarmLoss(
        positive - negative,
        positive,
        negative,
        found.log_weights,
        found.log_normalizer,
        dv=masked_sum(data.logsumexp.detach() - found.log_normalizer[found.data_group], mask),
        energy_data=-masked_sum(data.logsumexp.detach(), mask),
        energy_negatives=-masked_sum(model.logsumexp.detach() * found.share[found.negative_group], model.mask),
        relative_ess=masked_sum(found.statistics.relative_ess[found.data_group], mask),
        data_steps=mask.sum(),
    )
