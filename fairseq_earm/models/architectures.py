"""Named architectures with the sizes of Deng et al. 2020 (Section 4.1 and Table 1), and tiny ones for a CPU.

Parameters are counted with tied embeddings and GPT-2's vocabulary in fairseq, 50,264 symbols. Of the language models the
base has the paper's sizes; those of BALM and of the 24-layer models are chosen here to meet the paper's counts.
"""
from __future__ import annotations

from typing import NamedTuple

from fairseq.models import register_model_architecture
from fairseq.models.transformer_lm import base_lm_architecture


class Size(NamedTuple):
    """Layers, size of their states and of their FFN, attention heads."""

    layers: int
    embed_dim: int
    ffn_embed_dim: int
    attention_heads: int


TINY = Size(2, 128, 512, 4)
BASE = Size(12, 1024, 4096, 16)  # 203M parameters
BASE_24L = Size(24, 768, 2912, 16)  # 203M
LANGUAGE_MODELS = {
    "transformer_lm_residual_base": BASE,
    "transformer_lm_residual_base_24l": BASE_24L,
    "transformer_lm_residual_balm": Size(12, 1536, 5888, 16),  # 408M
    "transformer_lm_residual_balm_24l": Size(24, 1152, 4032, 16),  # 408M
    "transformer_lm_residual_tiny": TINY,
}
RESIDUAL_LANGUAGE_MODELS = {
    "residual_transformer_lm_base": BASE,
    "residual_transformer_lm_base_24l": BASE_24L,
    "residual_transformer_lm_tiny": TINY,
}
UNIDIRECTIONAL = {"unit": BASE, "unit_24l": BASE_24L, "unit_tiny": TINY}
BIDIRECTIONAL = {
    "bit_base": Size(12, 768, 3072, 12),  # RoBERTa-base, 125M
    "bit_med": BASE,
    "bit_large": Size(24, 1024, 4096, 16),  # RoBERTa-large, 355M
    "bit_tiny": TINY,
}


def _defaults(args, side: str, size: Size) -> None:
    for name, value in size._asdict().items():
        _default(args, f"{side}_{name}", value)


def _default(args, name: str, value) -> None:
    if getattr(args, name, None) is None:
        setattr(args, name, value)


def _language_model(size: Size):
    def architecture(args):
        _defaults(args, "decoder", size)
        _default(args, "share_decoder_input_output_embed", True)
        base_lm_architecture(args)

    return architecture


def _unidirectional(size: Size):
    def architecture(args):
        _defaults(args, "decoder", size)
        _default(args, "decoder_normalize_before", True)  # as all named architectures of transformer_lm

    return architecture


def _bidirectional(size: Size):
    return lambda args: _defaults(args, "encoder", size)


for _model, _sizes, _architecture in (
    ("transformer_lm", LANGUAGE_MODELS, _language_model),
    ("residual_transformer_lm", RESIDUAL_LANGUAGE_MODELS, _language_model),
    ("energy_transformer_unit", UNIDIRECTIONAL, _unidirectional),
    ("energy_transformer_bit", BIDIRECTIONAL, _bidirectional),
):
    for _name, _size in _sizes.items():
        register_model_architecture(_model, _name)(_architecture(_size))
