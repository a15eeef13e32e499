"""The loss head: all that cross-entropy, label smoothing and energies need of a softmax layer, read off it once.

Three numbers a step: the logsumexp, the target's logit and the mean logit. By plain autograd each would bring a tensor of
tokens × vocabulary of its own to the backward pass; here their gradient is one buffer,

    ∂/∂z = g_lse · softmax(z) + g_mean / V + g_target · [target],

and from hidden states it is formed a few rows at a time, so that tokens × vocabulary is never held.
"""
from __future__ import annotations

from typing import NamedTuple, Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fairseq_earm.ebm.products import Product

# Logits of a block, which should fit into a processor's cache; on other devices a block is the whole.
BLOCK = 2**18


class TokenStatistics(NamedTuple):
    """What one pass says about the tokens of its targets; each like the targets, in nats, float32 or wider.

    Attributes:
        logsumexp: log of the softmax's normaliser at each step, given the prefix before that step.
        target_logit: the logit of the target token at each step.
        mean_logit: mean of all logits at each step, None where it was not asked for.
    """

    logsumexp: Tensor
    target_logit: Tensor
    mean_logit: Optional[Tensor]


def token_statistics(logits: Tensor, target: Tensor, *, mean: bool = True) -> TokenStatistics:
    """Statistics of `target` under `logits`, with one gradient buffer.

    Args:
        logits: (..., V) of any floating dtype; half precision is widened block by block.
        target: (...) token indices; padded positions must hold a valid index and are masked by the caller.
        mean: whether to take the mean logit, which label smoothing alone needs.
    """
    return _shaped(_Statistics.apply(logits.reshape(-1, logits.size(-1)), target.reshape(-1), mean), target)


def projected_statistics(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Optional[Tensor] = None, *, rows: int = 512, mean: bool = True
) -> TokenStatistics:
    """Statistics of `target` under the logits hidden · weightᵀ + bias, of which `rows` steps are held at once.

    The logits are computed once more in the backward pass: one more matrix product beside three.

    Args:
        hidden: (..., D) states.
        weight: (V, D) output embedding, tied or not.
        target: (...) token indices.
        bias: (V,).
        rows: steps whose logits are held at once.
        mean: whether to take the mean logit.
    """
    # Under autocast the states, the weight and their product are of a lower precision, here as anywhere.
    dtype = F.linear(hidden[..., :0, :], weight, bias).dtype
    states = hidden.reshape(-1, hidden.size(-1)).to(dtype)
    bias = None if bias is None else bias.to(dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        found = _ProjectedStatistics.apply(states, weight.to(dtype), bias, target.reshape(-1), rows, mean)
    return _shaped(found, target)


class _Statistics(Function):
    """Logits (N, V) and targets (N,) to three (N,), the last of them None without `mean`."""

    @staticmethod
    def forward(ctx, logits: Tensor, target: Tensor, mean: bool) -> tuple:
        ctx.set_materialize_grads(False)
        found = _read(logits, target, mean)
        ctx.save_for_backward(logits, target, found.logsumexp)
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream: Optional[Tensor]) -> tuple:
        logits, target, logsumexp = ctx.saved_tensors
        return _gradient(logits, target, logsumexp, upstream, torch.empty_like(logits)), None, None


class _ProjectedStatistics(Function):
    """States (N, D), weight (V, D), bias (V,) or None and targets (N,) to three (N,), the last of them None without `mean`."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Optional[Tensor], target: Tensor, rows: int, mean: bool) -> tuple:
        ctx.set_materialize_grads(False)
        ctx.rows = rows
        blocks, logits = zip(hidden.split(rows), target.split(rows)), Product(weight, bias)
        parts = [_read(logits(states), tokens, mean) for states, tokens in blocks]
        found = [None if each[0] is None else torch.cat(each) for each in zip(*parts)]
        ctx.save_for_backward(hidden, weight, bias, target, found[0])
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream: Optional[Tensor]) -> tuple:
        hidden, weight, bias, target, logsumexp = ctx.saved_tensors
        of_hidden = torch.empty_like(hidden)
        # Sums over many blocks: in single precision, whatever the states' is.
        of_weight = torch.zeros_like(weight, dtype=logsumexp.dtype)
        of_bias = None if bias is None else torch.zeros_like(bias, dtype=logsumexp.dtype)
        for start in range(0, hidden.size(0), ctx.rows):
            block = slice(start, start + ctx.rows)
            logits = F.linear(hidden[block], weight, bias)
            own = [None if each is None else each[block] for each in upstream]
            gradient = _gradient(logits, target[block], logsumexp[block], own, logits)
            torch.mm(gradient, weight, out=of_hidden[block])
            if gradient.dtype == of_weight.dtype:
                of_weight.addmm_(gradient.t(), hidden[block])
            else:
                of_weight += gradient.t() @ hidden[block]
            if of_bias is not None:
                of_bias += gradient.sum(0, dtype=of_bias.dtype)
        of_bias = None if bias is None else of_bias.to(bias.dtype)
        return of_hidden, of_weight.to(weight.dtype), of_bias, None, None, None


def _read(logits: Tensor, target: Tensor, with_mean: bool) -> TokenStatistics:
    """Statistics of (N,) targets under (N, V) logits."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logsumexp = logits.new_empty(target.shape, dtype=dtype)
    mean = torch.empty_like(logsumexp) if with_mean else None
    for rows in _blocks(logits):
        wide = logits[rows].to(dtype)
        logsumexp[rows] = wide.logsumexp(-1)
        if mean is not None:
            mean[rows] = wide.mean(-1)
    return TokenStatistics(logsumexp, logits.gather(1, target.unsqueeze(1)).squeeze(1).to(dtype), mean)


def _shaped(found: tuple, like: Tensor) -> TokenStatistics:
    return TokenStatistics(*(None if each is None else each.view(like.shape) for each in found))


def _gradient(
    logits: Tensor, target: Tensor, logsumexp: Tensor, upstream: Sequence[Optional[Tensor]], out: Tensor
) -> Tensor:
    """Gradient of the logits (N, V), given those (N,) of the three statistics, in `out`, which may be `logits`."""
    of_logsumexp, of_target, of_mean = upstream
    for rows in _blocks(logits):
        block = out[rows]
        if of_logsumexp is None:
            block.zero_()
        else:
            wide = block if block.dtype == logsumexp.dtype else block.to(logsumexp.dtype)
            torch.sub(logits[rows], logsumexp[rows, None], out=wide)
            block.copy_(wide.exp_().mul_(of_logsumexp[rows, None]))
        if of_mean is not None:
            block.add_(of_mean[rows, None] / logits.size(1))
    if of_target is not None:
        out.scatter_add_(1, target.unsqueeze(1), of_target.unsqueeze(1).to(out.dtype))
    return out


def _blocks(logits: Tensor) -> list:
    """Slices of the rows of `logits` that are worked on at once."""
    count = logits.size(0)
    rows = max(1, BLOCK // logits.size(1)) if logits.device.type == "cpu" else max(1, count)
    return [slice(start, start + rows) for start in range(0, count, rows)]
