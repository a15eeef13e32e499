"""The source as a plain fairseq transformer reads it, without its padding."""
from __future__ import annotations

from typing import Callable, Iterator, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from fairseq.models.transformer import TransformerEncoder, TransformerEncoderBase
from fairseq.modules.transformer_layer import TransformerEncoderLayerBase
from torch import Tensor

from fairseq_earm.ebm.products import Products, block_sizes
from fairseq_earm.sampling.plain_layers import is_plain_stack, layers_of


class Source(NamedTuple):
    """A batch of B sources of up to S tokens, N of them in all, padding left out.

    Attributes:
        states: (N, C) the encoder's output.
        places: (N,) where each of them stands among the B · S.
        padding: (B, S) True where there is none.
    """

    states: Tensor
    places: Tensor
    padding: Tensor

    def spread(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """(B, S, out) what a function of single states makes of all, each in its place, zero at padding."""
        found = None
        for states, places in self.blocks(self.states, self.places):
            part = function(states)
            found = part.new_zeros(self.padding.numel(), part.size(1)) if found is None else found
            found.index_copy_(0, places, part)
        return found.view(*self.padding.shape, -1)

    def blocks(self, *values: Tensor) -> Iterator[Tuple[Tensor, ...]]:
        """(N, ...) values, on a CPU block by block as products take them: each stays in the cache from one to the next."""
        rows = self.places.numel()
        sizes = block_sizes(rows) if self.places.device.type == "cpu" else [rows]
        return zip(*(each.split(sizes) for each in values))

    def bias(self, dtype) -> Tensor:
        """(B, 1, S) what attention adds to its scores: minus infinity at padding."""
        zeros = torch.zeros(self.padding.shape, dtype=dtype, device=self.padding.device)
        return zeros.masked_fill(self.padding, -float("inf")).unsqueeze(1)


def source_of(encoder_out: dict) -> Optional[Source]:
    """What an encoder of another kind made of a batch; None where it is not what fairseq's transformers return."""
    states, masks = encoder_out.get("encoder_out", []), encoder_out.get("encoder_padding_mask", [])
    if len(states) != 1 or states[0].dim() != 3:
        return None
    none = torch.zeros(states[0].shape[1::-1], dtype=torch.bool, device=states[0].device)
    padding = none if len(masks) == 0 or masks[0] is None else masks[0].bool()
    places = (~padding).flatten().nonzero().squeeze(1)
    return Source(states[0].transpose(0, 1).flatten(0, 1)[places], places, padding)


def is_plain(encoder) -> bool:
    """Whether all of an encoder is fairseq's `TransformerEncoder`, in eval mode."""
    return (
        type(encoder) in (TransformerEncoder, TransformerEncoderBase)
        and hasattr(F, "scaled_dot_product_attention")
        and is_plain_stack(encoder, TransformerEncoderLayerBase)
    )


def read_source(encoder, src_tokens: Tensor, products: Products = Products()) -> Source:
    """What an encoder that `is_plain` makes of (B, S) tokens."""
    padding = src_tokens.eq(encoder.padding_idx)
    places = (~padding).flatten().nonzero().squeeze(1)
    embedded, _ = encoder.forward_embedding(src_tokens, None)
    source = Source(embedded.flatten(0, 1)[places], places, padding)
    for layer in layers_of(encoder):
        source = source._replace(states=_layer(layer, source, products))
    return source if encoder.layer_norm is None else source._replace(states=encoder.layer_norm(source.states))


def _layer(layer, source: Source, products: Products) -> Tensor:
    """(N, C) one layer's output."""
    mixed = _attend(layer, source, products)
    rest = _AfterAttention(layer, products)
    return torch.cat([rest(*block) for block in source.blocks(source.states, mixed)])


def _attend(layer, source: Source, products: Products) -> Tensor:
    """(N, C) each token's attention to its own sentence, its heads side by side."""
    attention = layer.self_attn
    if layer.normalize_before:
        source = source._replace(states=layer.self_attn_layer_norm(source.states))
    found = source.spread(products.joined([attention.q_proj, attention.k_proj, attention.v_proj]))
    parts = found.unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
    mixed = F.scaled_dot_product_attention(*parts, attn_mask=source.bias(found.dtype).unsqueeze(1))  # (B, heads, S, D)
    return mixed.transpose(1, 2).flatten(2).flatten(0, 1)[source.places]


class _AfterAttention:
    """What a layer does with each token alone."""

    def __init__(self, layer, products: Products):
        self.layer = layer
        self.out = products.of(layer.self_attn.out_proj)
        self.inner, self.outer = products.of(layer.fc1), products.of(layer.fc2)

    def __call__(self, residual: Tensor, mixed: Tensor) -> Tensor:
        """(R, C) inputs of the layer and what attention made of them, to (R, C)."""
        layer, before = self.layer, self.layer.normalize_before
        found = residual + self.out(mixed)
        residual = found if before else layer.self_attn_layer_norm(found)
        norm = layer.final_layer_norm
        found = residual + self.outer(layer.activation_fn(self.inner(norm(residual) if before else residual)))
        return found if before else norm(found)
