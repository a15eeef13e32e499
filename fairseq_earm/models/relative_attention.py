"""Attention by content and distance (Dai et al. 2019, "Transformer-XL", Section 3.3)."""
from __future__ import annotations

import math
from typing import Optional

import torch
from fairseq.modules import FairseqDropout
from torch import Tensor, nn

from fairseq_earm.ebm.energy import widen

WAVELENGTH = 10000


def distance_encodings(distances: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """(K,) distances → (K, dim) sinusoids R: sines in the first half, cosines in the second, as in Dai et al. 2019."""
    wide = torch.promote_types(dtype, torch.float32)
    frequencies = WAVELENGTH ** (-torch.arange(0, dim, 2, device=distances.device, dtype=wide) / dim)
    angles = distances.to(wide).unsqueeze(1) * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1).to(dtype)


def relative_shift(scores: Tensor) -> Tensor:
    """From scores by distance to scores by place, without an index (Dai et al. 2019, Appendix B).

    Args:
        scores: (..., T, K) of query i with distance K − 1, ..., 0. The queries are the last T of the K places.
    Returns:
        (..., T, K) of query i with place j, that is, at distance (K − T + i) − j. Places after the query's own hold
        values without meaning, for the mask.
    """
    *batch, queries, places = scores.shape
    padded = torch.cat([scores.new_zeros(*batch, queries, 1), scores], -1)
    return padded.view(*batch, places + 1, queries)[..., 1:, :].reshape(*batch, queries, places)


class RelativeAttention(nn.Module):
    """Causal multi-head attention whose scores are q·k + q·r + u·k + v·r, r the projected encoding of the distance.

    Args:
        dim: size of the states, a multiple of `heads`.
        heads: attention heads.
        dropout: probability that an attention weight is dropped.
    """

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.dropout_module = FairseqDropout(dropout, module_name=type(self).__name__)
        self.q_proj, self.k_proj, self.v_proj, self.position_proj, self.out_proj = (
            nn.Linear(dim, dim, bias=False) for _ in range(5)
        )

    def forward(
        self, x: Tensor, unread: Tensor, encodings: Tensor, biases: tuple, cache: Optional[dict] = None
    ) -> Tensor:
        """States of the queries, after each has looked at itself and all places before it.

        Args:
            x: (B, T, C) states of the queries.
            unread: (B, K', C) states of the places whose keys are not in the cache, those of x at their end.
            encodings: (K', C) encodings of as many distances, the largest first, down to the number of cached places.
            biases: u and v, (H, C / H) each.
            cache: keys, values and projected encodings of earlier places; extended in place.
        Returns:
            (B, T, C).
        """
        keys, values = self._by_head(self.k_proj(unread)), self._by_head(self.v_proj(unread))
        positions = self._by_head(self.position_proj(encodings))
        if cache:
            keys, values = torch.cat([cache["keys"], keys], -2), torch.cat([cache["values"], values], -2)
            positions = torch.cat([positions, cache["positions"]], -2)
        if cache is not None:
            cache.update(keys=keys, values=values, positions=positions)
        weights = self._weights(self._by_head(self.q_proj(x)), keys, positions, biases)
        return self.out_proj((weights @ values).transpose(1, 2).flatten(2))

    def _weights(self, queries: Tensor, keys: Tensor, positions: Tensor, biases: tuple) -> Tensor:
        """(B, H, T, K) attention weights, normalised in float32 at least."""
        by_content, by_distance = ((queries + bias.unsqueeze(1)) * self.scale for bias in biases)
        scores = by_content @ keys.transpose(-1, -2) + relative_shift(by_distance @ positions.transpose(-1, -2))
        steps, places = scores.shape[-2:]
        future = torch.ones(steps, places, dtype=torch.bool, device=scores.device).triu(places - steps + 1)
        weights = widen(scores).masked_fill(future, -math.inf).softmax(-1).to(keys)
        return self.dropout_module(weights)

    def _by_head(self, x: Tensor) -> Tensor:
        """(..., K, C) → (..., H, K, C / H)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)
