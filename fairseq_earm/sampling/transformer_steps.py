"""Step-wise decoding of a plain fairseq transformer, at little more than the cost of its matrix products."""
from __future__ import annotations

from typing import List, Optional, Sequence

import torch
from fairseq.models.transformer import TransformerDecoder, TransformerDecoderBase
from fairseq.modules import MultiheadAttention
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase
from torch import Tensor, nn

from fairseq_earm.ebm.energy import widen
from fairseq_earm.sampling.prefill import prefill
from fairseq_earm.sampling.products import Product
from fairseq_earm.sampling.scoring import full_logits

FIRST_STEPS = 32  # that a cache has room for at first; it doubles when they are taken


class TransformerSteps:
    """What fairseq's incremental decoding computes, up to rounding, for `TransformerDecoder` itself in eval mode.

    Queries, keys and values come from one product; keys and values of past steps are written in place; those of the
    source are computed once per source, whatever the number of its samples; a finished row costs a copy of one row.

    Args:
        decoder: a decoder that `knows` is true of; its parameters must stay as they are.
        encoder_out: the encoder's output, for a decoder with attention to it.
    """

    dead_share = 0.0

    def __init__(self, decoder, encoder_out: Optional[dict] = None):
        self.decoder = decoder
        memory, bias = (None, None) if encoder_out is None else _source(encoder_out)
        self.source_bias = bias
        self.layers = [_Layer(layer, memory) for layer in decoder.layers]
        projection = getattr(decoder, "output_projection", None)
        self.projection = Product(projection.weight, projection.bias) if type(projection) is nn.Linear else None

    @staticmethod
    def knows(decoder) -> bool:
        """Whether each part of the decoder is fairseq's own, as it came, and none of its rarer options is in use."""
        return (
            type(decoder) in (TransformerDecoder, TransformerDecoderBase)
            and not decoder.training
            and not decoder.cross_self_attention
            and decoder.quant_noise is None
            and all(map(_is_plain_layer, decoder.layers))
            and all(map(_is_untouched, decoder.modules()))
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
        fewer = _moves(rows)
        for layer in self.layers:
            layer.select(rows, fewer)

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

    def __init__(self, layer, memory: Optional[Tensor]):
        self.layer = layer
        self.heads = layer.self_attn.num_heads
        attention = layer.self_attn
        self.own = _joined([attention.q_proj, attention.k_proj, attention.v_proj], (attention.scaling, 1, 1))
        self.own_out = _product(layer.self_attn.out_proj)
        self.cache: Optional[Tensor] = None  # (2, R, heads, steps, C / heads): keys and values of past steps
        self.steps = 0
        self.memory: Optional[Tensor] = None  # (2, R, heads, S, C / heads): those of the source
        if layer.encoder_attn is not None and memory is not None:
            self.query = _joined([layer.encoder_attn.q_proj], (layer.encoder_attn.scaling,))
            self.memory = _keys_and_values(layer.encoder_attn, memory)
            self.memory_out = _product(layer.encoder_attn.out_proj)
        self.inner, self.outer = _product(layer.fc1), _product(layer.fc2)

    def __call__(self, x: Tensor, step: int, source_bias: Optional[Tensor]) -> Tensor:
        layer, before = self.layer, self.layer.normalize_before
        residual, norm = x, layer.self_attn_layer_norm
        found = residual + self.own_out(self._attend_to_past(norm(x) if before else x, step))
        x = found if before else norm(found)
        if self.memory is not None:
            residual, norm = x, layer.encoder_attn_layer_norm
            queries = self.query(norm(x) if before else x).unflatten(1, (self.heads, -1))
            found = residual + self.memory_out(_attend(queries, self.memory, source_bias))
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
        return _attend(found[:, 0], self.cache[:, :, :, : self.steps])

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

    def select(self, rows: Tensor, moves: Optional[tuple]) -> None:
        for name in ("cache", "memory"):
            kept = getattr(self, name)
            if kept is not None:
                setattr(self, name, _pick(kept, rows, moves, self.steps if name == "cache" else kept.size(3)))


def _attend(queries: Tensor, keys_and_values: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """(R, C) of one query a row (R, heads, D), already scaled, over (2, R, heads, steps, D)."""
    keys, values = (part.flatten(0, 1) for part in keys_and_values)
    # Keys times query, not query times keys: read in the order in which they lie, up to four times as fast on a CPU.
    scores = torch.bmm(keys, queries.reshape(keys.size(0), 1, -1).transpose(1, 2)).transpose(1, 2)
    if bias is not None:
        scores = (scores.view(*queries.shape[:2], -1) + bias).view_as(scores)
    shares = scores.softmax(-1, dtype=torch.float32).to(values)
    return torch.bmm(shares, values).view(queries.size(0), -1)


def _moves(rows: Tensor) -> Optional[tuple]:
    """Where rows must be moved from and to so that the first ones are `rows`."""
    places = torch.arange(rows.numel(), device=rows.device)
    moved = rows != places
    return rows[moved], places[moved]


def _pick(kept: Tensor, rows: Tensor, moves, steps: int) -> Tensor:
    """Rows of (2, R, heads, steps, D): in place as long as they do not become more."""
    if rows.numel() > kept.size(1):
        return kept.index_select(1, rows)
    origin, place = moves
    used = kept[:, :, :, :steps]
    used[:, place] = used[:, origin]
    return kept[:, : rows.numel()]


def _source(encoder_out: dict) -> tuple:
    """(S, B, C) encoder output, and (B, 1, S) minus infinity where it is padding, or None."""
    [states] = encoder_out["encoder_out"]
    masks = encoder_out["encoder_padding_mask"]
    if len(masks) == 0 or masks[0] is None or not masks[0].any():
        return states, None
    bias = torch.zeros(masks[0].shape, dtype=states.dtype, device=states.device).masked_fill(masks[0], -float("inf"))
    return states, bias.unsqueeze(1)


def _product(linear: nn.Linear) -> Product:
    return Product(linear.weight, linear.bias)


def _keys_and_values(attention, memory: Tensor) -> Tensor:
    """(2, B, heads, S, D) of the source (S, B, C)."""
    length, batch, width = memory.shape
    found = _joined([attention.k_proj, attention.v_proj])(memory.reshape(-1, width))
    return found.view(length, batch, 2, attention.num_heads, -1).permute(2, 1, 3, 0, 4).contiguous()


def _joined(parts: List[nn.Linear], scales: Sequence[float] = (1, 1)) -> Product:
    """One product in the place of several, each scaled."""
    weight = torch.cat([part.weight * scale for part, scale in zip(parts, scales)])
    if parts[0].bias is None:
        return Product(weight)
    return Product(weight, torch.cat([part.bias * scale for part, scale in zip(parts, scales)]))


def _is_plain_layer(layer) -> bool:
    if type(layer) is not TransformerDecoderLayerBase:
        return False
    attentions = [attention for attention in (layer.self_attn, layer.encoder_attn) if attention is not None]
    return (
        all(map(_is_plain_attention, attentions))
        and type(layer.fc1) is type(layer.fc2) is nn.Linear
        and all(getattr(layer, name, None) is None for name in ("c_attn", "attn_ln", "ffn_layernorm", "w_resid"))
    )


def _is_plain_attention(attention) -> bool:
    return (
        type(attention) is MultiheadAttention
        and attention.bias_k is None
        and not attention.add_zero_attn
        and not getattr(attention, "use_xformers", False)
        and all(type(getattr(attention, name)) is nn.Linear for name in ("q_proj", "k_proj", "v_proj", "out_proj"))
    )


def _is_untouched(module: nn.Module) -> bool:
    """No hooks, no other forward than its class's, no dropout that stays on."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or "forward" in vars(module)
        or getattr(module, "apply_during_inference", False)
    )
