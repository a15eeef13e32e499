"""Estimates of log Z, and of what the joint model says, from samples of the base model (Deng et al. 2020, Theorem 2, Eq. 5)."""
from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class LogPartition(NamedTuple):
    """Two estimates of log Z that bracket it in expectation, asymptotically."""

    lower: Tensor
    upper: Tensor


class LogProbability(NamedTuple):
    """Two estimates of a log-probability under the joint model that bracket it in expectation, asymptotically."""

    lower: Tensor
    upper: Tensor


def log_partition(neg_energies: Tensor) -> LogPartition:
    """Bracket log Z = log E_q[exp(−E)] from n samples of q.

    lower T_n is the log-mean-exp of all samples; upper (2n−1) T_n − 2(n−1) T_{n−1}, with T_{n−1} averaged over all
    leave-one-out sets. (Theorem 2 writes Z where log Z is meant.) With one sample both are that sample.

    Args:
        neg_energies: (..., n), −E of each sample.
    """
    n = neg_energies.size(-1)
    values = neg_energies.double()
    total = values.logsumexp(-1, keepdim=True)
    lower = total.squeeze(-1) - math.log(n)
    if n == 1:
        return LogPartition(lower, lower.clone())
    leave_one_out = _log_sum_without_each(values, total) - math.log(n - 1)
    upper = (2 * n - 1) * lower - 2 * (n - 1) * leave_one_out.mean(-1)
    return LogPartition(lower, upper)


def exact_log_partition(log_probs: Tensor, neg_energies: Tensor) -> LogPartition:
    """log Σ q(x) exp(−E(x)) where every x can be listed: both estimates are the value itself.

    Args:
        log_probs, neg_energies: (..., V), log q and −E of each x.
    """
    value = (log_probs.double() + neg_energies.double()).logsumexp(-1)
    return LogPartition(value, value.clone())


def joint_log_prob(base_log_prob: Tensor, energy: Tensor, log_z: LogPartition) -> LogProbability:
    """log P(x) = log P_LM(x) − E(x) − log Z of whole sequences, all of one shape."""
    unnormalized = base_log_prob.double() - energy.double()
    return LogProbability(unnormalized - log_z.upper, unnormalized - log_z.lower)


def stepwise_log_probs(base_log_probs: Tensor, completions: LogPartition) -> LogProbability:
    """log P(x_t | x_<t) of each step (Eq. 5), (..., T).

    P(x_t | x_<t) = P_LM(x_t | x_<t) · C_t / C_{t−1}, where C_t = E[exp(−E)] over what the base model makes of the first t
    tokens. The lower estimate has the numerator's lower one and the denominator's upper one; the upper the reverse. Over the
    steps the C_t cancel but for the ends: with exact C_t the steps add up to `joint_log_prob`.

    Args:
        base_log_probs: (..., T), log P_LM(x_t | x_<t).
        completions: (..., T + 1), log C_t of t = 0..T; the first is log Z, the last −E(x), exactly.
    """
    base = base_log_probs.double()
    lower, upper = completions
    return LogProbability(base + lower[..., 1:] - upper[..., :-1], base + upper[..., 1:] - lower[..., :-1])


def _log_sum_without_each(values: Tensor, total: Tensor) -> Tensor:
    """(..., n) log Σ_{j≠i} exp(values_j), in O(n).

    log-subtract-exp loses all digits where one sample carries the sum, so that sample's rest is summed directly.
    """
    share = (values - total).exp()
    rest = total + torch.log1p(-share.clamp_max(1 - 1e-9))
    largest = values.argmax(-1, keepdim=True)
    rest_of_largest = values.scatter(-1, largest, -math.inf).logsumexp(-1, keepdim=True)
    return rest.scatter(-1, largest, rest_of_largest)
