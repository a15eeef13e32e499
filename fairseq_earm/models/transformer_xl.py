"""Transformer-XL (Dai et al. 2019): a language model that looks back at the hidden states of earlier segments."""
from dataclasses import dataclass, field
from typing import Optional

import torch
from fairseq import utils
from fairseq.dataclass import FairseqDataclass
from fairseq.models import (
    FairseqIncrementalDecoder,
    FairseqLanguageModel,
    register_model,
    register_model_architecture,
)
from fairseq.models.transformer import Embedding
from fairseq.modules import AdaptiveInput, AdaptiveSoftmax, FairseqDropout, LayerNorm
from torch import Tensor, nn

from fairseq_earm.errors import UsageError
from fairseq_earm.models.carried_memory import CarriedMemory
from fairseq_earm.models.relative_attention import RelativeAttention, distance_encodings


@dataclass
class TransformerXLConfig(FairseqDataclass):
    """The defaults are the paper's standard model for WikiText-103 ("Tr-XL": 16 layers, 410/2100, 10 heads)."""

    decoder_layers: int = field(default=16, metadata={"help": "number of layers"})
    decoder_embed_dim: int = field(default=410, metadata={"help": "size of the states"})
    decoder_ffn_embed_dim: int = field(default=2100, metadata={"help": "size of the FFN"})
    decoder_attention_heads: int = field(default=10, metadata={"help": "number of attention heads"})
    dropout: float = field(default=0.1, metadata={"help": "dropout probability"})
    attention_dropout: float = field(default=0.0, metadata={"help": "dropout probability for attention weights"})
    mem_len: int = field(
        default=150,
        metadata={
            "help": "hidden states of earlier segments that each layer looks back at, where the task carries them on "
            "(--carry-memory); may be longer in evaluation: --model-overrides \"{'mem_len': 640}\""
        },
    )
    share_decoder_input_output_embed: bool = field(
        default=False, metadata={"help": "share input and output embeddings"}
    )
    adaptive_softmax_cutoff: Optional[str] = field(
        default=None,
        metadata={"help": "comma separated list of adaptive softmax cutoff points; with stock criterions: adaptive_loss"},
    )
    adaptive_softmax_dropout: float = field(
        default=0, metadata={"help": "dropout probability for the adaptive softmax's tail projections"}
    )
    adaptive_softmax_factor: float = field(
        default=4, metadata={"help": "by how much each band of the adaptive softmax is smaller than the one before"}
    )
    adaptive_input: bool = field(default=False, metadata={"help": "adaptive input embeddings"})
    adaptive_input_factor: float = field(
        default=4, metadata={"help": "by how much each band of the adaptive input is smaller than the one before"}
    )
    adaptive_input_cutoff: Optional[str] = field(
        default=None, metadata={"help": "comma separated list of adaptive input cutoff points"}
    )
    tie_adaptive_weights: bool = field(
        default=False, metadata={"help": "share the embeddings of adaptive softmax and adaptive input"}
    )
    tie_adaptive_proj: bool = field(
        default=False, metadata={"help": "share the projections of adaptive softmax and adaptive input too"}
    )


class TransformerXLLayer(nn.Module):
    """Relative attention, then an FFN, each added to what it read and normalised afterwards."""

    def __init__(self, cfg: TransformerXLConfig):
        super().__init__()
        dim = cfg.decoder_embed_dim
        self.self_attn = RelativeAttention(dim, cfg.decoder_attention_heads, cfg.attention_dropout)
        self.self_attn_layer_norm = LayerNorm(dim)
        self.fc1 = nn.Linear(dim, cfg.decoder_ffn_embed_dim)
        self.fc2 = nn.Linear(cfg.decoder_ffn_embed_dim, dim)
        self.final_layer_norm = LayerNorm(dim)
        self.dropout_module = FairseqDropout(cfg.dropout, module_name=type(self).__name__)

    def forward(self, x: Tensor, unread: Tensor, encodings: Tensor, biases: tuple, cache: Optional[dict]) -> Tensor:
        """(B, T, C) → (B, T, C); the arguments are those of `RelativeAttention`."""
        attended = self.self_attn(x, unread, encodings, biases, cache)
        x = self.self_attn_layer_norm(x + self.dropout_module(attended))
        inner = self.dropout_module(torch.relu(self.fc1(x)))
        return self.final_layer_norm(x + self.dropout_module(self.fc2(inner)))


class TransformerXLDecoder(FairseqIncrementalDecoder):
    """Each token sees the whole memory, itself and the tokens before it in its segment.

    Attributes:
        carried: the memory lent to it, which passes read and leave; None: every segment stands for itself.
        mem_len: most hidden states that a pass leaves in it.
        reads_prefixes: an incremental call reads all tokens that are new, see `sampling.prefill`.
    """

    reads_prefixes = True

    def __init__(self, cfg: TransformerXLConfig, dictionary, embed_tokens: nn.Module):
        super().__init__(dictionary)
        dim, heads = cfg.decoder_embed_dim, cfg.decoder_attention_heads
        self.dim = dim
        self.mem_len = cfg.mem_len
        self.carried: Optional[CarriedMemory] = None
        self.layers = nn.ModuleList(TransformerXLLayer(cfg) for _ in range(cfg.decoder_layers))
        self.layers.apply(_initialise)
        # One u and v for all layers, as Dai et al. 2019 have it.
        self.content_bias, self.position_bias = (nn.Parameter(torch.zeros(heads, dim // heads)) for _ in range(2))
        self.dropout_module = FairseqDropout(cfg.dropout, module_name=type(self).__name__)
        self.embed_tokens = embed_tokens
        self.embed_scale = dim**0.5
        self.output_projection = None
        if cfg.adaptive_softmax_cutoff is not None:
            self.adaptive_softmax = _adaptive_softmax(cfg, dictionary, embed_tokens)
        else:
            self.output_projection = nn.Linear(dim, len(dictionary), bias=False)
            nn.init.normal_(self.output_projection.weight, std=dim**-0.5)
            if cfg.share_decoder_input_output_embed:
                self.output_projection.weight = embed_tokens.weight

    def forward(
        self, prev_output_tokens, encoder_out=None, incremental_state=None, features_only=False, memory=None, src_lengths=None
    ):
        """Logits of the token after each; with an adaptive softmax the states from which it computes them.

        Args:
            prev_output_tokens: (B, T) tokens, padded on the right.
            incremental_state: an empty dictionary reads the tokens after the memory carried along; afterwards only the
                tokens behind those of the calls before are read. The memory itself is left as it is.
            memory: (layers, B, M, C) read in place of the carried one, which is left as it is; see `select_memory`.
        Returns:
            (B, T, V), or (B, T', V) of the T' tokens read in this call, and what fairseq's decoders say beside it.
        Raises:
            ValueError: more rows than the memory has.
        """
        x, extra = self.extract_features(prev_output_tokens, incremental_state=incremental_state, memory=memory)
        return (x if features_only else self.output_layer(x)), extra

    def extract_features(self, prev_output_tokens, encoder_out=None, incremental_state=None, memory=None):
        """The top states, as `forward` without the output layer."""
        carries = self.carried is not None and memory is None and incremental_state is None
        tokens, caches, cached = prev_output_tokens, [None] * len(self.layers), 0
        if incremental_state is not None:
            tokens, caches, cached = self._continue(tokens, incremental_state)
        x = self.dropout_module(self.embed_scale * self.embed_tokens(tokens))
        memory = x.new_zeros(len(caches), len(x), 0, self.dim) if cached else self._look_back(x, memory)
        encodings = self._encodings(x, cached, cached + memory.size(2) + x.size(1))
        inputs = []
        for layer, past, cache in zip(self.layers, memory, caches):
            inputs.append(x)
            x = layer(x, torch.cat([past, x], 1), encodings, (self.content_bias, self.position_bias), cache)
        if carries:
            self.carried.left = self._newest(memory, inputs)
        return self.dropout_module(x), {"attn": [None]}

    def output_layer(self, features):
        """States (B, T, C) → logits (B, T, V); as they are for an adaptive softmax."""
        return features if self.output_projection is None else self.output_projection(features)

    def select_memory(self, rows: Tensor) -> Tensor:
        """(layers, R, M, C) what these rows of the present batch look back at, whether it was read already or not."""
        memory = None if self.carried is None else self.carried.read
        if memory is None:
            return self.content_bias.new_zeros(len(self.layers), rows.numel(), 0, self.dim)
        return memory.index_select(1, rows.to(memory.device))

    def reorder_incremental_state(self, incremental_state, new_order):
        """Keep these rows, in this order, of what was read so far."""
        state = self.get_incremental_state(incremental_state, "read")
        for cache in state["layers"] if state else ():
            cache.update({name: cache[name].index_select(0, new_order) for name in ("keys", "values")})

    def _continue(self, tokens: Tensor, incremental_state: dict) -> tuple:
        """The tokens that are new, the caches of the layers and how many places these hold."""
        state = self.get_incremental_state(incremental_state, "read")
        if state is None:
            state = {"tokens": 0, "layers": [{} for _ in self.layers]}
            self.set_incremental_state(incremental_state, "read", state)
        # At least the last one: also a caller that passes no more than that is understood.
        new = tokens[:, min(state["tokens"], tokens.size(1) - 1) :]
        state["tokens"] += new.size(1)
        keys = state["layers"][0].get("keys")
        return new, state["layers"], 0 if keys is None else keys.size(2)

    def _look_back(self, x: Tensor, memory: Optional[Tensor]) -> Tensor:
        """(layers, B, M, C) the memory given, or else the one carried along, for the first B rows."""
        if memory is None and self.carried is not None:
            memory = self.carried.read
        if memory is None:
            return x.new_zeros(len(self.layers), x.size(0), 0, self.dim)
        if memory.size(1) < x.size(0):
            raise ValueError(f"{x.size(0)} rows of tokens, and a memory of {memory.size(1)}")
        return memory[:, : x.size(0)].to(x)

    def _encodings(self, x: Tensor, nearest: int, end: int) -> Tensor:
        """Encodings of the distances end − 1, ..., nearest."""
        distances = torch.arange(end - 1, nearest - 1, -1, device=x.device)
        return self.dropout_module(distance_encodings(distances, self.dim, x.dtype))

    def _newest(self, memory: Tensor, inputs: list) -> Tensor:
        """(layers, B, at most mem_len, C) the last of the memory's and the segment's states, without their graph."""
        segment = torch.stack([x.detach()[:, max(x.size(1) - self.mem_len, 0) :] for x in inputs])
        older = min(self.mem_len - segment.size(2), memory.size(2))
        return torch.cat([memory[:, :, memory.size(2) - older :].detach(), segment], 2)


@register_model("transformer_xl_lm", dataclass=TransformerXLConfig)
class TransformerXLLanguageModel(FairseqLanguageModel):
    """Transformer-XL as one of fairseq's language models."""

    @classmethod
    def build_model(cls, args, task):
        """Build an untrained model.

        Raises:
            UsageError: sizes that do not fit together.
        """
        _check(args, task.target_dictionary)
        return cls(TransformerXLDecoder(args, task.target_dictionary, _embedding(args, task.source_dictionary)))


@register_model_architecture("transformer_xl_lm", "transformer_xl_lm_tiny")
def transformer_xl_lm_tiny(args):
    """A model for a CPU."""
    sizes = {"decoder_layers": 2, "decoder_embed_dim": 128, "decoder_ffn_embed_dim": 512, "decoder_attention_heads": 4}
    for name, value in {**sizes, "mem_len": 64}.items():
        setattr(args, name, getattr(args, name, value))


def _initialise(module: nn.Module) -> None:
    """Normal weights: standard deviation 0.02 at the paper's width, as in its code, and smaller in wider models.

    Where every sum is normalised, small weights leave the way through sixteen layers of sums open at first.
    """
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.4 * min(module.weight.shape) ** -0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _embedding(cfg, dictionary) -> nn.Module:
    if not cfg.adaptive_input:
        return Embedding(len(dictionary), cfg.decoder_embed_dim, dictionary.pad())
    cutoff = utils.eval_str_list(cfg.adaptive_input_cutoff, type=int)
    dim = cfg.decoder_embed_dim
    return AdaptiveInput(len(dictionary), dictionary.pad(), dim, cfg.adaptive_input_factor, dim, cutoff)


def _adaptive_softmax(cfg, dictionary, embed_tokens) -> AdaptiveSoftmax:
    return AdaptiveSoftmax(
        len(dictionary),
        cfg.decoder_embed_dim,
        utils.eval_str_list(cfg.adaptive_softmax_cutoff, type=int),
        dropout=cfg.adaptive_softmax_dropout,
        factor=cfg.adaptive_softmax_factor,
        adaptive_inputs=embed_tokens if cfg.tie_adaptive_weights else None,
        tie_proj=cfg.tie_adaptive_proj,
    )


def _check(cfg, dictionary) -> None:
    """Refuse sizes and ties that fit no model (UsageError)."""
    dim, heads = cfg.decoder_embed_dim, cfg.decoder_attention_heads
    if heads < 1 or dim % heads or dim % 2:
        raise UsageError(
            f"--decoder-embed-dim {dim}: must be even, and a multiple of --decoder-attention-heads {heads}; give another size"
        )
    if cfg.mem_len < 0:
        raise UsageError(f"--mem-len {cfg.mem_len}: give 0, for no memory, or more")
    for name in ("decoder_layers", "decoder_ffn_embed_dim"):
        if getattr(cfg, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: give at least 1")
    for flag, cutoff in (("softmax", cfg.adaptive_softmax_cutoff), ("input", cfg.adaptive_input_cutoff)):
        if cutoff is not None:
            _check_cutoff(f"--adaptive-{flag}-cutoff {cutoff}", cutoff, len(dictionary))
    if cfg.adaptive_input and cfg.adaptive_input_cutoff is None:
        raise UsageError("--adaptive-input: give --adaptive-input-cutoff as well")
    if cfg.adaptive_input and cfg.share_decoder_input_output_embed:
        raise UsageError("--share-decoder-input-output-embed: adaptive inputs are shared by --tie-adaptive-weights; give that")
    if cfg.adaptive_softmax_cutoff is not None and cfg.share_decoder_input_output_embed:
        raise UsageError(
            "--share-decoder-input-output-embed: an adaptive softmax is shared by --adaptive-input --tie-adaptive-weights; give those"
        )
    for given, needs in (("adaptive_input_cutoff", "adaptive_input"), ("tie_adaptive_proj", "tie_adaptive_weights")):
        if getattr(cfg, given) and not getattr(cfg, needs):
            flag, other = (f"--{name.replace('_', '-')}" for name in (given, needs))
            raise UsageError(f"{flag}: no effect without {other}; give both, or neither")
    same = cfg.adaptive_input_cutoff == cfg.adaptive_softmax_cutoff and cfg.adaptive_input_factor == cfg.adaptive_softmax_factor
    if cfg.tie_adaptive_weights and not (cfg.adaptive_input and same):
        raise UsageError(
            "--tie-adaptive-weights: needs --adaptive-input and the same cutoff and factor for input and softmax; give them alike"
        )


def _check_cutoff(flag: str, cutoff: str, symbols: int) -> None:
    try:
        bands = utils.eval_str_list(cutoff, type=int)
    except (NameError, SyntaxError, TypeError, ValueError):
        bands = []
    if not bands or bands != sorted({*bands}) or bands[0] < 1:
        raise UsageError(f"{flag}: give numbers of words, each larger than the one before, such as 20000,60000")
    if bands[-1] > symbols:
        raise UsageError(f"{flag}: the dictionary has {symbols} symbols; give less")
