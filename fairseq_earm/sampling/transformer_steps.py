"""Step-wise decoding of a plain fairseq transformer, at little more than the cost of its matrix products."""
from __future__ import annotations

from typing import Optional, Tuple

import torch
from fairseq.models.transformer import TransformerDecoder, TransformerDecoderBase
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase
from torch import Tensor, nn

from fairseq_earm.ebm.energy import widen
from fairseq_earm.ebm.products import Products
from fairseq_earm.sampling.plain_layers import is_plain_stack, layers_of
from fairseq_earm.sampling.prefill import prefill
from fairseq_earm.sampling.scoring import full_logits
from fairseq_earm.sampling.transformer_source import Source

FIRST_STEPS = 32  # that a cache has room for at first; it doubles when they are taken
WIDE = 128  # dimensions of a head from which on a CPU sums the source's values faster where they lie dimension by dimension


class TransformerSteps:
    """What fairseq's incremental decoding computes, up to rounding, for `TransformerDecoder` itself in eval mode.

    Queries, keys and values come from one product; keys and values of past steps are written in place; those of the
    source are computed once per source, whatever the number of its samples; a finished row costs a copy of one row.

    Args:
        decoder: a decoder that `knows` is true of; its parameters must stay as they are.
        source: what the encoder made of the source, for a decoder with attention to it.
        products: how the layers multiply; the logits do so in the model's own precision.
    """

    dead_share = 0.0

    def __init__(self, decoder, source: Optional[Source] = None, products: Products = Products()):
        self.decoder = decoder
        padded = source is not None and bool(source.padding.any())
        self.source_bias = source.bias(source.states.dtype) if padded else None
        self.layers = [_Layer(layer, source, products) for layer in layers_of(decoder)]
        projection = getattr(decoder, "output_projection", None)
        self.projection = Products().of(projection) if type(projection) is nn.Linear else None

    @staticmethod
    def knows(decoder) -> bool:
        """Whether each part of the decoder is fairseq's own, as it came, and none of its rarer options is in use."""
        return (
            type(decoder) in (TransformerDecoder, TransformerDecoderBase)
            and not decoder.cross_self_attention
            and is_plain_stack(decoder, TransformerDecoderLayerBase)
        )

    def prefill(self, prefixes: Tensor) -> None:
        """As `StockSteps.prefill`."""
        cache: dict = {}
        prefill(self.decoder, prefixes, cache)
        for layer in self.layers:
            layer.take_over(cache)

    def next_logits(self, prefixes: Tensor) -> Tensor:
        """As `StockSteps.next_logits`."""
        step = prefixes.size(1) - 1
        x = self._embed(prefixes)
        for layer in self.layers:
            x = layer(x, step, self.source_bias)
        if self.decoder.layer_norm is not None:
            x = self.decoder.layer_norm(x)
        if self.decoder.project_out_dim is not None:
            x = self.decoder.project_out_dim(x)
        if self.projection is None:
            return widen(full_logits(self.decoder, (self.decoder.output_layer(x.unsqueeze(1)),))[:, 0])
        return widen(self.projection(x))

    def select(self, rows: Tensor) -> None:
        """As `StockSteps.select`."""
        if self.source_bias is not None:
            self.source_bias = self.source_bias.index_select(0, rows)
        moves = _moves(rows)
        for layer in self.layers:
            layer.select(rows, moves)

    def _embed(self, prefixes: Tensor) -> Tensor:
        """(R, C) the last tokens' embeddings, at their position."""
        decoder = self.decoder
        x = decoder.embed_scale * decoder.embed_tokens(prefixes[:, -1])
        if decoder.project_in_dim is not None:
            x = decoder.project_in_dim(x)
        if decoder.embed_positions is not None:
            x = x + decoder.embed_positions(prefixes[:1], incremental_state={})[:, -1]
        return x if decoder.layernorm_embedding is None else decoder.layernorm_embedding(x)


class _Layer:
    """One layer: (R, C) of a step to (R, C)."""

    def __init__(self, layer, source: Optional[Source], products: Products):
        self.layer = layer
        self.heads = layer.self_attn.num_heads
        attention = layer.self_attn
        self.own = products.joined([attention.q_proj, attention.k_proj, attention.v_proj], (attention.scaling, 1, 1))
        self.own_out = products.of(layer.self_attn.out_proj)
        self.cache: Optional[Tensor] = None  # (2, R, heads, steps, C / heads): keys and values of past steps
        self.steps = 0
        self.memory: Optional[Tuple[Tensor, ...]] = None  # those of the source, as `_keys_and_values` gives them
        if layer.encoder_attn is not None and source is not None:
            self.query = products.joined([layer.encoder_attn.q_proj], (layer.encoder_attn.scaling,))
            self.memory = _keys_and_values(layer.encoder_attn, source, products)
            self.memory_out = products.of(layer.encoder_attn.out_proj)
        self.inner, self.outer = products.of(layer.fc1), products.of(layer.fc2)

    def __call__(self, x: Tensor, step: int, source_bias: Optional[Tensor]) -> Tensor:
        layer, before = self.layer, self.layer.normalize_before
        residual, norm = x, layer.self_attn_layer_norm
        found = residual + self.own_out(self._attend_to_past(norm(x) if before else x, step))
        x = found if before else norm(found)
        if self.memory is not None:
            residual, norm = x, layer.encoder_attn_layer_norm
            queries = self.query(norm(x) if before else x).unflatten(1, (self.heads, -1))
            keys, values = self.memory
            found = residual + self.memory_out(_attend(queries, keys, values if _are_wide(queries) else values.mT, source_bias))
            x = found if before else norm(found)
        residual, norm = x, layer.final_layer_norm
        found = residual + self.outer(layer.activation_fn(self.inner(norm(x) if before else x)))
        return found if before else norm(found)

    def _attend_to_past(self, x: Tensor, step: int) -> Tensor:
        rows, width = x.shape
        found = self.own(x).view(rows, 3, self.heads, width // self.heads)
        self._make_room(found, step)
        self.cache[:, :, :, step].copy_(found[:, 1:].transpose(0, 1))
        self.steps = step + 1
        keys, values = self.cache[:, :, :, : self.steps]
        return _attend(found[:, 0], keys, values.mT)

    def _make_room(self, found: Tensor, step: int) -> None:
        if self.cache is None:
            self.cache = found.new_empty(2, found.size(0), self.heads, FIRST_STEPS, found.size(-1))
        elif step == self.cache.size(3):
            self.cache = torch.cat([self.cache, torch.empty_like(self.cache)], 3)

    def take_over(self, cache: dict) -> None:
        """Go on from what fairseq's attention keeps."""
        kept = self.layer.self_attn._get_input_buffer(cache)
        if kept:
            keys_and_values = torch.stack([kept["prev_key"], kept["prev_value"]])
            self.steps = keys_and_values.size(3)
            self.cache = torch.cat([keys_and_values, torch.empty_like(keys_and_values)], 3)

    def select(self, rows: Tensor, moves: tuple) -> None:
        if self.cache is not None:
            self.cache = _pick(self.cache, 1, rows, moves, self.steps)
        if self.memory is not None:
            self.memory = tuple(_pick(kept, 0, rows, moves) for kept in self.memory)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """(R, C) of one query a row (R, heads, D), already scaled, over keys (R, heads, steps, D) and values (R, heads, D, steps)."""
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)
    # Keys times query, not query times keys: read in the order in which they lie, up to four times as fast on a CPU.
    scores = torch.bmm(keys, queries.reshape(keys.size(0), 1, -1).transpose(1, 2)).transpose(1, 2)
    if bias is not None:
        scores = (scores.view(*queries.shape[:2], -1) + bias).view_as(scores)
    shares = scores.softmax(-1, dtype=torch.float32).to(values)
    # Likewise: a product from the left of what lies step by step, one from the right of what lies dimension by dimension.
    if values.stride(1) == 1:
        return torch.bmm(shares, values.mT).view(queries.size(0), -1)
    return torch.bmm(values, shares.mT).view(queries.size(0), -1)


def _moves(rows: Tensor) -> tuple:
    """Where rows must be moved from and to so that the first ones are `rows`."""
    places = torch.arange(rows.numel(), device=rows.device)
    moved = rows != places
    return rows[moved], places[moved]


def _pick(kept: Tensor, dim: int, rows: Tensor, moves: tuple, steps: Optional[int] = None) -> Tensor:
    """Rows, which are dimension `dim`, of (..., heads, steps, D): in place as long as they do not become more."""
    if rows.numel() > kept.size(dim):
        return kept.index_select(dim, rows)
    origin, place = moves
    used = (kept if steps is None else kept[..., :steps, :]).movedim(dim, 0)
    used[place] = used[origin]
    return kept.narrow(dim, 0, rows.numel())


def _keys_and_values(attention, source: Source, products: Products) -> Tuple[Tensor, Tensor]:
    """Keys and values (B, heads, S, D) of the source; the values of wide heads as (B, heads, D, S)."""
    found = source.spread(products.joined([attention.k_proj, attention.v_proj]))
    keys, values = found.unflatten(2, (2, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return keys.contiguous(), (values.mT if _are_wide(values) else values).contiguous()


def _are_wide(heads: Tensor) -> bool:
    """Of (..., D)."""
    return heads.size(-1) >= WIDE
