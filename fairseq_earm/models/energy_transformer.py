"""Energy networks of Deng et al. 2020 (Section 4.1): a transformer's top states, averaged and projected to one number.

UNIT reads from left to right and starts from a language model, BIT reads in both directions and starts from RoBERTa.
"""
from dataclasses import dataclass, field
from typing import Optional

import torch
from fairseq import utils
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.models import BaseFairseqModel, register_model
from fairseq.models.transformer import Embedding, TransformerConfig, TransformerDecoderBase, TransformerEncoderBase
from fairseq.models.transformer.transformer_config import DecoderConfig, EncDecBaseConfig
from fairseq.modules.transformer_sentence_encoder import init_bert_params
from torch import Tensor, nn

from fairseq_earm.ebm.energy import widen
from fairseq_earm.models.energy_init import LANGUAGE_MODEL, MASKED_LANGUAGE_MODEL, start_from_checkpoint


class EnergyModel(BaseFairseqModel):
    """A network from a sequence to its energy: the projected mean of the top states of all its tokens.

    The network puts a start token of its own before every sequence, and its state counts too; so a row of nothing but
    padding is the empty sequence, and has an energy like any other.

    Args:
        trunk: a transformer, see `top_states`.
        dim: size of its states.
        start: index of the start token.
        max_positions: tokens the trunk can read, the start token included.

    Attributes:
        vocabulary_size: tokens must be below it.
    """

    def __init__(self, trunk: nn.Module, dim: int, start: int, max_positions: int):
        super().__init__()
        self.trunk = trunk
        self.start = start
        self.pad = trunk.padding_idx
        self.vocabulary_size = trunk.embed_tokens.num_embeddings
        self.trunk_positions = max_positions
        self.energy_projection = nn.Linear(dim, 1)
        nn.init.normal_(self.energy_projection.weight, std=0.02)
        nn.init.zeros_(self.energy_projection.bias)

    @classmethod
    def build_model(cls, cfg, task):
        """A network for the task's `energy_dictionary`, or else its source dictionary.

        Raises:
            UsageError: `--energy-init` names nothing this network can start from.
        """
        dictionary = getattr(task, "energy_dictionary", None) or task.source_dictionary
        model = cls(cfg, dictionary)
        start_from_checkpoint(model, cfg, cls.pretrained)
        return model

    def forward(self, src_tokens: Tensor) -> Tensor:
        """Energies of sequences, low where the data should be.

        Args:
            src_tokens: (B, L) tokens without a start token, padded on the right.
        Returns:
            (B,) energies, in float32 or wider.
        Raises:
            ValueError: L is more than `max_positions()`.
        """
        states, real = self.states(src_tokens)
        mean = widen(states).masked_fill(~real.unsqueeze(-1), 0).sum(1) / real.sum(1, keepdim=True)
        # Not a matrix product: autocast would compute that in half precision.
        weight, bias = self.energy_projection.weight, self.energy_projection.bias
        return (mean * weight.to(mean)).sum(-1) + bias.to(mean)

    def states(self, src_tokens: Tensor):
        """Top states of the start token and the sequence's → (B, 1 + L, D), and which are not padding, (B, 1 + L)."""
        if src_tokens.size(1) > self.max_positions():
            raise ValueError(f"{src_tokens.size(1)} tokens; the energy network reads {self.max_positions()} at most")
        start = src_tokens.new_full((src_tokens.size(0), 1), self.start)
        tokens = torch.cat([start, src_tokens], 1)
        return self.top_states(tokens), tokens.ne(self.pad)

    def top_states(self, tokens: Tensor) -> Tensor:
        """The trunk's top states, (B, T) → (B, T, D)."""
        raise NotImplementedError

    def max_positions(self) -> int:
        """The most tokens that a sequence may have."""
        return self.trunk_positions - 1


@dataclass
class EnergyTransformerConfig(FairseqDataclass):
    """What both networks take."""

    energy_init: Optional[str] = field(
        default=None,
        metadata={
            "help": "checkpoint that the network starts from, of the same sizes and with the same dictionary: for UNIT a "
            "transformer_lm, for BIT a roberta trained by masked_lm; needed at the start of a training only"
        },
    )
    dropout: float = field(default=0.1, metadata={"help": "dropout probability"})
    attention_dropout: float = field(default=0.0, metadata={"help": "dropout probability for attention weights"})
    activation_dropout: float = field(default=0.0, metadata={"help": "dropout probability after activation in FFN"})
    activation_fn: ChoiceEnum(utils.get_available_activation_fns()) = field(
        default="relu", metadata={"help": "activation function to use"}
    )
    max_positions: int = field(
        default=1024,
        metadata={
            "help": "most tokens the network reads, a start token of its own included; with learned positions as many as "
            "in the checkpoint"
        },
    )


@dataclass
class EnergyTransformerUnitConfig(EnergyTransformerConfig):
    """UNIT: the flags of `transformer_lm`; the sizes are those of the paper's base model."""

    decoder_embed_dim: int = field(default=1024, metadata={"help": "size of the states"})
    decoder_input_dim: Optional[int] = field(
        default=None, metadata={"help": "size of the embeddings; by default that of the states"}
    )
    decoder_ffn_embed_dim: int = field(default=4096, metadata={"help": "size of the FFN"})
    decoder_layers: int = field(default=12, metadata={"help": "number of layers"})
    decoder_attention_heads: int = field(default=16, metadata={"help": "number of attention heads"})
    decoder_normalize_before: bool = field(default=False, metadata={"help": "apply layernorm before each block"})
    no_decoder_final_norm: bool = field(default=False, metadata={"help": "no extra layernorm after the last block"})
    decoder_learned_pos: bool = field(default=False, metadata={"help": "learned positional embeddings"})
    no_token_positional_embeddings: bool = field(default=False, metadata={"help": "no positional embeddings"})
    layernorm_embedding: bool = field(default=False, metadata={"help": "layernorm on embeddings"})
    no_scale_embedding: bool = field(default=False, metadata={"help": "do not scale embeddings"})


@register_model("energy_transformer_unit", dataclass=EnergyTransformerUnitConfig)
class UnidirectionalEnergyTransformer(EnergyModel):
    """UNIT: states that have seen the tokens up to their own, by the decoder of a `transformer_lm`."""

    pretrained = LANGUAGE_MODEL

    def __init__(self, cfg, dictionary):
        # fairseq's language models read end-of-sentence first.
        super().__init__(_build_decoder(cfg, dictionary), cfg.decoder_embed_dim, dictionary.eos(), cfg.max_positions)

    def top_states(self, tokens: Tensor) -> Tensor:
        return self.trunk(tokens, features_only=True)[0]


def _build_decoder(cfg, dictionary) -> TransformerDecoderBase:
    sizes = DecoderConfig(
        embed_dim=cfg.decoder_embed_dim,
        ffn_embed_dim=cfg.decoder_ffn_embed_dim,
        layers=cfg.decoder_layers,
        attention_heads=cfg.decoder_attention_heads,
        normalize_before=cfg.decoder_normalize_before,
        learned_pos=cfg.decoder_learned_pos,
    )
    config = TransformerConfig(
        decoder=sizes,
        no_decoder_final_norm=cfg.no_decoder_final_norm,
        no_token_positional_embeddings=cfg.no_token_positional_embeddings,
        layernorm_embedding=cfg.layernorm_embedding,
        no_scale_embedding=cfg.no_scale_embedding,
        max_target_positions=cfg.max_positions,
        **_common_settings(cfg),
    )
    embeddings = Embedding(len(dictionary), cfg.decoder_input_dim or cfg.decoder_embed_dim, dictionary.pad())
    return TransformerDecoderBase(config, dictionary, embeddings, no_encoder_attn=True, output_projection=nn.Identity())


@dataclass
class EnergyTransformerBitConfig(EnergyTransformerConfig):
    """BIT: the flags of `roberta`; the sizes and defaults are those of RoBERTa-base."""

    attention_dropout: float = field(default=0.1, metadata={"help": "dropout probability for attention weights"})
    activation_fn: ChoiceEnum(utils.get_available_activation_fns()) = field(
        default="gelu", metadata={"help": "activation function to use"}
    )
    max_positions: int = field(
        default=512,
        metadata={"help": "most tokens the network reads, a start token of its own included: as many as in the checkpoint"},
    )
    encoder_embed_dim: int = field(default=768, metadata={"help": "size of the states"})
    encoder_ffn_embed_dim: int = field(default=3072, metadata={"help": "size of the FFN"})
    encoder_layers: int = field(default=12, metadata={"help": "number of layers"})
    encoder_attention_heads: int = field(default=12, metadata={"help": "number of attention heads"})
    encoder_normalize_before: bool = field(
        default=False, metadata={"help": "layernorm before each block and none on embeddings, as in roberta_prenorm"}
    )
    layernorm_embedding: bool = field(
        default=False,
        metadata={"help": "layernorm on embeddings all the same, as a roberta trained with --encoder-normalize-before has it"},
    )


@register_model("energy_transformer_bit", dataclass=EnergyTransformerBitConfig)
class BidirectionalEnergyTransformer(EnergyModel):
    """BIT: states that have seen every token, by the encoder of a `roberta`."""

    pretrained = MASKED_LANGUAGE_MODEL

    def __init__(self, cfg, dictionary):
        super().__init__(_build_encoder(cfg, dictionary), cfg.encoder_embed_dim, dictionary.bos(), cfg.max_positions)

    def top_states(self, tokens: Tensor) -> Tensor:
        return self.trunk(tokens)["encoder_out"][0].transpose(0, 1)


def _build_encoder(cfg, dictionary) -> TransformerEncoderBase:
    sizes = EncDecBaseConfig(
        embed_dim=cfg.encoder_embed_dim,
        ffn_embed_dim=cfg.encoder_ffn_embed_dim,
        layers=cfg.encoder_layers,
        attention_heads=cfg.encoder_attention_heads,
        normalize_before=cfg.encoder_normalize_before,
        learned_pos=True,
    )
    config = TransformerConfig(
        encoder=sizes,
        layernorm_embedding=cfg.layernorm_embedding or not cfg.encoder_normalize_before,
        no_scale_embedding=True,
        max_source_positions=cfg.max_positions,
        **_common_settings(cfg),
    )
    embeddings = nn.Embedding(len(dictionary), cfg.encoder_embed_dim, dictionary.pad())
    return TransformerEncoderBase(config, dictionary, embeddings).apply(init_bert_params)


def _common_settings(cfg) -> dict:
    names = ("dropout", "attention_dropout", "activation_dropout", "activation_fn")
    return {name: getattr(cfg, name) for name in names}
