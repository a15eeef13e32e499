"""A matrix product with one weight, many times over: the weight is put in the processor's own order once."""
from __future__ import annotations

import functools
from typing import Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Elements of a weight from which on the order pays: below, the call itself costs more than it saves.
LEAST = 2**17


class Product:
    """y = x Wᵀ + b, without gradients, for a W that stays as it is.

    On a CPU, oneDNN keeps a large weight in blocks that fit its kernels, where a plain product has to arrange them anew
    each time: a third less time at 128 rows, two thirds at 10. The values differ by rounding.

    Args:
        weight: (out, in).
        bias: (out,) or None.
    """

    def __init__(self, weight: Tensor, bias: Optional[Tensor] = None):
        self.weight = weight.detach()
        self.bias = None if bias is None else bias.detach()
        self.packed = _pack(self.weight) if _worth_packing(self.weight) else None

    def __call__(self, x: Tensor) -> Tensor:
        """(R, in) to (R, out)."""
        if self.packed is None:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def product_of(linear: nn.Linear) -> Product:
    """The product that a linear layer stands for."""
    return Product(linear.weight, linear.bias)


def joined_product(linears: Sequence[nn.Linear], scales: Optional[Sequence[float]] = None) -> Product:
    """One product in the place of several of one input, their outputs side by side, each scaled."""
    scales = scales or [1] * len(linears)
    weight = torch.cat([linear.weight * scale for linear, scale in zip(linears, scales)])
    if linears[0].bias is None:
        return Product(weight)
    return Product(weight, torch.cat([linear.bias * scale for linear, scale in zip(linears, scales)]))


def _worth_packing(weight: Tensor) -> bool:
    return (
        weight.numel() >= LEAST
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and not torch.is_autocast_cpu_enabled()  # which would have the product in another precision
        and _can_pack()
    )


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())


@functools.lru_cache(maxsize=None)
def _can_pack() -> bool:
    """Whether this torch has oneDNN's products, which it offers to its own compiler only: tried once."""
    if not torch.backends.mkldnn.is_available():
        return False
    weight, x = torch.eye(16) + 1, torch.arange(32.0).view(2, 16)
    try:
        found = torch.ops.mkldnn._linear_pointwise(x, _pack(weight), None, "none", [], "")
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.allclose(found, F.linear(x, weight))
