"""The matrix products that decoding step by step cannot avoid, and nothing else."""
from __future__ import annotations

from typing import List

import torch
from fairseq.models.transformer import TransformerModel
from torch import Tensor


class MatrixProducts:
    """What any decoder with a cache multiplies to draw so many rows for so many steps, with the model's own weights.

    Once: the encoder's products, and the keys and values that the decoder's attention reads of its output. Per step and
    layer: query, key and value in one; scores and values over a cache that grows, and over the source; the output of
    both attentions and the query of the second; two of the feed-forward network. Per step: the output projection.
    No biases, sums, norms or softmaxes, nothing copied, nothing drawn.

    Args:
        model: a transformer of fairseq without adaptive softmax.
        sources: rows of source sentences.
        length: tokens of the longest one.
        alive: rows that are drawn for, by step; a multiple of `sources` at first.
    """

    def __init__(self, model: TransformerModel, sources: int, length: int, alive: List[int]):
        self.output = _transposed(model.decoder.output_projection)
        self.encoder = [_EncoderLayer(layer) for layer in model.encoder.layers]
        self.decoder = [_DecoderLayer(layer, sources, length, alive) for layer in model.decoder.layers]
        self.alive, self.per_source = alive, alive[0] // sources
        self.states = self.output.new_empty(alive[0], self.output.size(0)).normal_()
        self.logits = self.output.new_empty(alive[0], self.output.size(1))
        self.source_states = self.output.new_empty(sources, length, self.encoder[0].projections.size(0)).normal_()

    @torch.no_grad()
    def __call__(self) -> int:
        """Multiply; the number of tokens drawn."""
        for layer in self.encoder:
            layer.multiply(self.source_states)
        for layer in self.decoder:
            self.source_states @ layer.source_projections
        for step, rows in enumerate(self.alive, start=1):
            for layer in self.decoder:
                layer.multiply(self.states[:rows], step, self.per_source)
            torch.mm(self.states[:rows], self.output, out=self.logits[:rows])
        return sum(self.alive)


class _EncoderLayer:
    def __init__(self, layer):
        self.heads = layer.self_attn.num_heads
        self.projections = _self_projections(layer.self_attn)
        self.rest = _transposed(layer.self_attn.out_proj), _transposed(layer.fc1), _transposed(layer.fc2)

    def multiply(self, states: Tensor) -> None:
        rows, length, dim = states.shape
        output, first, second = self.rest
        states @ self.projections
        heads = states.view(rows * self.heads, length, dim // self.heads)
        torch.bmm(torch.bmm(heads, heads.transpose(1, 2)), heads)
        states @ output
        states @ first @ second


class _DecoderLayer:
    def __init__(self, layer, sources: int, length: int, alive: List[int]):
        own, cross = layer.self_attn, layer.encoder_attn
        self.heads, size = own.num_heads, own.embed_dim // own.num_heads
        self.projections = _self_projections(own)
        self.source_projections = torch.cat([_transposed(cross.k_proj), _transposed(cross.v_proj)], 1)
        self.rest = [_transposed(linear) for linear in (own.out_proj, cross.q_proj, cross.out_proj, layer.fc1, layer.fc2)]
        self.cache = [self.projections.new_empty(alive[0] * self.heads, len(alive), size).normal_() for _ in range(2)]
        self.source = [self.projections.new_empty(sources * self.heads, length, size).normal_() for _ in range(2)]

    def multiply(self, states: Tensor, step: int, per_source: int) -> None:
        output, cross_query, cross_output, first, second = self.rest
        states @ self.projections
        self._attend(states.view(-1, 1, self.cache[0].size(2)), [cache[:, :step] for cache in self.cache])
        states @ output
        states @ cross_query
        # Rows of one source read the same keys. Once rows are finished, this many sources have all of theirs.
        full = states.size(0) // per_source
        queries = states[: full * per_source].view(full * self.heads, per_source, self.source[0].size(2))
        self._attend(queries, self.source)
        states @ cross_output
        states @ first @ second

    def _attend(self, queries: Tensor, cache: List[Tensor]) -> None:
        keys, values = (tensor[: queries.size(0)] for tensor in cache)
        torch.bmm(torch.bmm(queries, keys.transpose(1, 2)), values)


def _self_projections(attention) -> Tensor:
    """(d, 3d) query, key and value."""
    return torch.cat([_transposed(linear) for linear in (attention.q_proj, attention.k_proj, attention.v_proj)], 1)


def _transposed(linear) -> Tensor:
    """(in, out) weights of a linear layer, as they lie in memory."""
    return linear.weight.detach().t()
