"""Estimates of log Z from samples of the base model (Deng et al. 2020, Theorem 2)."""
from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class LogPartition(NamedTuple):
    """Two estimates of log Z that bracket it in expectation, asymptotically."""

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


def _log_sum_without_each(values: Tensor, total: Tensor) -> Tensor:
    """(..., n) log Σ_{j≠i} exp(values_j), in O(n).

    log-subtract-exp loses all digits where one sample carries the sum, so that sample's rest is summed directly.
    """
    share = (values - total).exp()
    rest = total + torch.log1p(-share.clamp_max(1 - 1e-9))
    largest = values.argmax(-1, keepdim=True)
    rest_of_largest = values.scatter(-1, largest, -math.inf).logsumexp(-1, keepdim=True)
    return rest.scatter(-1, largest, rest_of_largest)
