"""Transformer-XL by its definition (Dai et al. 2019, Section 3.3), one pair of places after the other, without a shift."""
from __future__ import annotations

import math
from typing import List, Tuple

import torch
from torch import Tensor


def encoding(distance: int, dim: int) -> Tensor:
    """(dim,) R at one distance, number by number."""
    sines = [math.sin(distance / 10000 ** (2 * m / dim)) for m in range(dim // 2)]
    cosines = [math.cos(distance / 10000 ** (2 * m / dim)) for m in range(dim // 2)]
    return torch.tensor(sines + cosines, dtype=torch.float64)


def attend(decoder, attention, past: Tensor, present: Tensor) -> Tensor:
    """(T, C) what an attention makes of a segment's states (T, C) behind those of the memory (M, C)."""
    places, (heads, size) = torch.cat([past, present]), decoder.content_bias.shape
    rows = []
    for i in range(len(past), len(places)):
        parts = []
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            query = (attention.q_proj.weight @ places[i])[part]
            u, v = decoder.content_bias[h], decoder.position_bias[h]
            scores = []
            for j in range(i + 1):
                key = (attention.k_proj.weight @ places[j])[part]
                at_distance = (attention.position_proj.weight @ encoding(i - j, places.size(1)).to(places))[part]
                scores.append((query @ key + query @ at_distance + u @ key + v @ at_distance) / math.sqrt(size))
            weights = torch.stack(scores).softmax(0)
            parts.append(sum(weights[j] * (attention.v_proj.weight @ places[j])[part] for j in range(i + 1)))
        rows.append(attention.out_proj.weight @ torch.cat(parts))
    return torch.stack(rows)


def read_segment(decoder, tokens: Tensor, memory: List[Tensor]) -> Tuple[Tensor, List[Tensor]]:
    """Top states (T, C) of one row of tokens (T,), and what each layer has read then, memory included: (M + T, C) each."""
    x = decoder.embed_tokens(tokens.unsqueeze(0))[0] * math.sqrt(decoder.content_bias.numel())
    read = []
    for layer, past in zip(decoder.layers, memory):
        read.append(torch.cat([past, x]))
        x = layer.self_attn_layer_norm(x + attend(decoder, layer.self_attn, past, x))
        x = layer.final_layer_norm(x + layer.fc2(torch.relu(layer.fc1(x))))
    return x, read


@torch.no_grad()
def read_text(decoder, segments: List[Tensor], mem_len: int) -> List[Tensor]:
    """Logits (T, V) of each segment (T,) of one text, every layer's last `mem_len` states carried to the next."""
    memory = [torch.zeros(0, decoder.content_bias.numel()).to(decoder.content_bias) for _ in decoder.layers]
    found = []
    for tokens in segments:
        top, read = read_segment(decoder, tokens, memory)
        found.append(decoder.output_layer(top))
        memory = [states[max(len(states) - mem_len, 0) :] for states in read]
    return found
