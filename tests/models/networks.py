"""Untrained energy networks on a handful of words."""
from types import SimpleNamespace

import torch

from fairseq_earm.models.energy_transformer import (
    BidirectionalEnergyTransformer,
    EnergyTransformerBitConfig,
    EnergyTransformerUnitConfig,
    UnidirectionalEnergyTransformer,
)
from tests.tiny_model import tiny_dictionary

DICTIONARY = tiny_dictionary(6)


def sizes(side):
    return {f"{side}_embed_dim": 16, f"{side}_ffn_embed_dim": 32, f"{side}_layers": 2, f"{side}_attention_heads": 2}


def config(name, **settings):
    if name == "unit":
        flags = {**sizes("decoder"), "decoder_normalize_before": True, "max_positions": 12, **settings}
        return EnergyTransformerUnitConfig(**flags)
    return EnergyTransformerBitConfig(**{**sizes("encoder"), "max_positions": 12, **settings})


def network(name, seed=0, task=None, **settings):
    """UNIT or BIT in float64 and eval mode, its energies spread widely."""
    torch.manual_seed(seed)
    model = {"unit": UnidirectionalEnergyTransformer, "bit": BidirectionalEnergyTransformer}[name].build_model(
        config(name, **settings), task or SimpleNamespace(source_dictionary=DICTIONARY)
    )
    torch.nn.init.normal_(model.energy_projection.weight)
    torch.nn.init.normal_(model.energy_projection.bias)
    return model.double().eval()


def sequences(*lengths, seed=1):
    """(B, L) random words, right-padded."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.full((len(lengths), max(lengths)), DICTIONARY.pad())
    for row, length in enumerate(lengths):
        tokens[row, :length] = torch.randint(DICTIONARY.nspecial, len(DICTIONARY), (length,), generator=generator)
    return tokens
