"""Noise-contrastive estimation of a residual energy (Deng et al. 2020, Eq. 3)."""
from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor


def residual_nce_loss(
    energy_data: Tensor, energy_noise: Tensor, *, noise_per_data: float = 1, label_smoothing: float = 0.0
) -> Tensor:
    """Logistic loss that tells data from samples of the base model, summed (Eq. 3).

    With ν samples per datum the posterior odds of "data" are exp(−E) / ν, so that the optimum is
    E = log P_LM − log P_data for every ν, and the model P_LM · exp(−E) is normalised by itself.

    Args:
        energy_data: (B,) energies of data.
        energy_noise: (ν·B,), energies of samples of the base model.
        noise_per_data: ν.
        label_smoothing: probability with which a label is taken for wrong; the optimum above holds for 0.
    Returns:
        The loss of all B + ν·B sequences, in nats.
    """
    data, noise = (nce_logits(energy, noise_per_data) for energy in (energy_data, energy_noise))
    return _cross_entropy(data, 1 - label_smoothing) + _cross_entropy(noise, label_smoothing)


def nce_logits(energy: Tensor, noise_per_data: float = 1) -> Tensor:
    """Log odds that a sequence is data: −E − log ν; positive where "data" is the likelier."""
    return -energy - math.log(noise_per_data)


def _cross_entropy(logits: Tensor, probability: float) -> Tensor:
    target = logits.new_full(logits.shape, probability)
    return F.binary_cross_entropy_with_logits(logits, target, reduction="sum")
