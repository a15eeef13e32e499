"""Matrix products with weights that stay as they are: each is put in the processor's own order once."""
from __future__ import annotations

import functools
from typing import List, NamedTuple, Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Elements of a weight from which on its order and its precision matter: below, the call itself costs as much.
LEAST = 2**17
# Rows of one packed product. oneDNN compiles a kernel of half a megabyte for each number of rows that it meets.
WHOLE_BLOCKS, STEP = (512, 128), 8


class Product:
    """y = x Wᵀ + b, without gradients.

    On a CPU, oneDNN keeps a large weight in blocks that fit its kernels, where a plain product has to arrange them anew
    each time: a third less time at 128 rows, two thirds at 10. The values differ by rounding.

    Args:
        weight: (out, in).
        bias: (out,) or None.
        bf16: have a large product of float32 in bfloat16, its result in float32 again.
    """

    def __init__(self, weight: Tensor, bias: Optional[Tensor] = None, *, bf16: bool = False):
        self.bf16 = bf16 and weight.dtype == torch.float32 and weight.numel() >= LEAST
        dtype = torch.bfloat16 if self.bf16 else weight.dtype
        self.weight = weight.detach().to(dtype)
        self.bias = None if bias is None else bias.detach().to(dtype)
        known = self.bf16 or weight.dtype == torch.float32
        self.packed = _pack(self.weight) if known and _worth_packing(weight) else None

    def __call__(self, x: Tensor) -> Tensor:
        """(R, in) to (R, out)."""
        read = x.bfloat16() if self.bf16 else x
        found = F.linear(read, self.weight, self.bias) if self.packed is None else self._in_blocks(read)
        return found.to(x.dtype) if self.bf16 else found

    def _in_blocks(self, x: Tensor) -> Tensor:
        sizes = block_sizes(x.size(0))
        if len(sizes) == 1:
            return self._multiply(x)
        found = x.new_empty(x.size(0), self.weight.size(0))
        for block, place in zip(x.split(sizes), found.split(sizes)):
            place.copy_(self._multiply(block))
        return found

    def _multiply(self, x: Tensor) -> Tensor:
        rows = x.size(0)
        more = kernel_rows(rows) - rows
        if more:  # F.pad copies also where there is nothing to add
            x = F.pad(x, (0, 0, 0, more))
        found = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return found[:rows] if more else found


def block_sizes(rows: int) -> List[int]:
    """Rows, of which there may be any number, as blocks of few sizes: whole ones, and one of what is left."""
    sizes = []
    for whole in WHOLE_BLOCKS:
        sizes += [whole] * (rows // whole)
        rows %= whole
    return sizes + [rows] if rows or not sizes else sizes


def kernel_rows(rows: int) -> int:
    """Rows of the kernel that takes a block of `rows`: as many, or a few more."""
    return 1 << max(rows - 1, 0).bit_length() if rows <= STEP else -(-rows // STEP) * STEP


class Products(NamedTuple):
    """How the linear layers of a model are multiplied with.

    Attributes:
        bf16: large ones in bfloat16.
    """

    bf16: bool = False

    def of(self, linear: nn.Linear) -> Product:
        """What the layer computes."""
        return Product(linear.weight, linear.bias, bf16=self.bf16)

    def joined(self, linears: Sequence[nn.Linear], scales: Optional[Sequence[float]] = None) -> Product:
        """One product in the place of several of one input, their outputs side by side, each scaled."""
        scales = scales or [1] * len(linears)
        weight = torch.cat([linear.weight * scale for linear, scale in zip(linears, scales)])
        biases = [linear.bias for linear in linears]
        bias = None if biases[0] is None else torch.cat([bias * scale for bias, scale in zip(biases, scales)])
        return Product(weight, bias, bf16=self.bf16)


def bf16_helps(device: torch.device) -> bool:
    """Whether a device multiplies in bfloat16 by itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)  # earlier ones only emulate it
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    return _can_pack() and supported()


def _worth_packing(weight: Tensor) -> bool:
    return (
        weight.numel() >= LEAST
        and weight.device.type == "cpu"
        and not _autocast()  # which would have the product in another precision
        and _can_pack()
    )


def _autocast() -> bool:
    try:
        return torch.is_autocast_enabled("cpu")
    except TypeError:  # torch before 2.4
        return torch.is_autocast_cpu_enabled()


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
