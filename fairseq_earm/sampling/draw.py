"""Drawing tokens from a softmax."""
from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128  # tokens


def draw(logits: Tensor, generator: Optional[torch.Generator] = None) -> tuple:
    """Draw one token per row by the inverse of the cumulative distribution, many times cheaper than multinomial.

    A running sum over the vocabulary would take longer than the softmax: there is one over blocks of it, and one over
    the tokens of the block that is met.

    Args:
        logits: (R, V).
        generator: source of random numbers on the logits' device; by default the global one.
    Returns:
        (R,) tokens and (R,) their log-probability.
    """
    probabilities = logits.softmax(-1)
    blocks = _block_sums(probabilities).cumsum(-1)
    total = blocks[:, -1:]
    point = torch.rand(total.shape, generator=generator, dtype=total.dtype, device=total.device) * total
    block, point = _locate(blocks, point)
    before = F.pad(blocks, (1, 0)).gather(1, block)
    places = block * BLOCK + torch.arange(BLOCK, device=block.device)
    behind = places >= logits.size(1)
    places = places.clamp_max(logits.size(1) - 1)
    inside = probabilities.gather(1, places).masked_fill(behind, 0.0)
    place, _ = _locate(inside.cumsum(-1), (point - before).clamp_min(0))  # a GPU's running sums need not rise all the way
    tokens = places.gather(1, place)
    return tokens.squeeze(1), probabilities.gather(1, tokens).log().squeeze(1)


def _block_sums(probabilities: Tensor) -> Tensor:
    """(R, blocks) sums of `BLOCK` tokens each, the last of what is left."""
    whole = probabilities.size(1) // BLOCK * BLOCK
    sums = probabilities[:, :whole].unflatten(1, (-1, BLOCK)).sum(-1) if whole else probabilities[:, :0]
    rest = probabilities[:, whole:]
    return torch.cat([sums, rest.sum(-1, keepdim=True)], 1) if rest.size(1) else sums


def _locate(cumulative: Tensor, point: Tensor) -> tuple:
    """(R, 1) the first place whose running sum exceeds a point (R, 1), and that point, moved below the last sum.

    Rounding could lift the point onto the last sum, behind the last place that has any probability.
    """
    total = cumulative[:, -1:]
    point = torch.minimum(point, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, point, right=True).clamp_max(cumulative.size(1) - 1), point


def without_padding(logits: Tensor, pad: int) -> Tensor:
    """Logits under which padding has no probability."""
    return logits.index_fill(-1, torch.tensor([pad], device=logits.device), -float("inf"))
