"""Named architectures: the paper's parameter counts, and that --arch finds them."""
import functools
from argparse import Namespace

import pytest
import torch
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_NAME_REGISTRY, ARCH_MODEL_REGISTRY, build_model

from fairseq_earm.models import architectures
from fairseq_earm.models.energy_init import LANGUAGE_MODEL, MASKED_LANGUAGE_MODEL, UNTRAINED
from tests.models.networks import DICTIONARY, sequences

SYMBOLS = 50264
TASK = Namespace(source_dictionary=DICTIONARY, target_dictionary=DICTIONARY)


@functools.lru_cache(maxsize=None)
def configured(arch, *flags):
    """The model's configuration as `fairseq-train --arch` makes it."""
    parser = options.get_training_parser()
    with_task = ["data", "--task", "language_modeling", "--tokens-per-sample", "512"]
    return convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, [*with_task, "--arch", arch, *flags])).model


def parameters(arch):
    """How many the architecture has on the paper's vocabulary, counted on one layer and a few words."""
    side = "encoder" if arch.startswith("bit") else "decoder"
    layers = configured(arch)[f"{side}_layers"]
    model = build_model(configured(arch, f"--{side}-layers", "1"), TASK)
    sizes = {name: value.numel() for name, value in model.named_parameters() if not UNTRAINED.search(name)}
    in_layer = sum(size for name, size in sizes.items() if ".layers.0." in name)
    words = sum(size for name, size in sizes.items() if "embed_tokens" in name or "output_projection" in name)
    return sum(sizes.values()) + (layers - 1) * in_layer + words // len(DICTIONARY) * (SYMBOLS - len(DICTIONARY))


@pytest.mark.parametrize(
    "arch, millions",
    [
        ("transformer_lm_residual_base", 203),
        ("transformer_lm_residual_base_24l", 203),
        ("transformer_lm_residual_balm", 408),
        ("transformer_lm_residual_balm_24l", 408),
        ("unit", 203),
        ("unit_24l", 203),
        ("bit_base", 125),
        ("bit_med", 203),
        ("bit_large", 355),
    ],
)
def test_parameters_as_in_the_paper(arch, millions):
    assert parameters(arch) == pytest.approx(millions * 1e6, rel=0.01)


def test_the_count_is_that_of_a_whole_model():
    whole = build_model(configured("unit_tiny"), TASK)
    in_words = (SYMBOLS - len(DICTIONARY)) * 128
    assert parameters("unit_tiny") == sum(value.numel() for value in whole.parameters()) + in_words
    tied = build_model(configured("transformer_lm_residual_tiny"), TASK)
    assert parameters("transformer_lm_residual_tiny") == sum(value.numel() for value in tied.parameters()) + in_words


def test_deeper_models_are_as_large_and_twice_as_deep():
    for name, size in architectures.LANGUAGE_MODELS.items():
        assert size.embed_dim % size.attention_heads == 0
        if name.endswith("_24l"):
            assert size.layers == 2 * architectures.LANGUAGE_MODELS[name[: -len("_24l")]].layers


def test_flags_win_over_an_architecture():
    cfg = configured("unit_tiny", "--decoder-layers", "1", "--decoder-learned-pos")
    assert (cfg.decoder_layers, cfg.decoder_embed_dim, cfg.decoder_learned_pos) == (1, 128, True)


def test_what_unit_shares_with_the_base_model():
    """A network of the same name starts from a base model without further flags."""
    for base, arch in (("base", "unit"), ("base_24l", "unit_24l"), ("tiny", "unit_tiny")):
        lm, unit = configured(f"transformer_lm_residual_{base}"), configured(arch)
        assert [str(lm[flag]) for flag in LANGUAGE_MODEL.flags] == [str(unit[flag]) for flag in LANGUAGE_MODEL.flags]


def test_what_bit_shares_with_roberta():
    for ours, stock in (("bit_base", "roberta_base"), ("bit_large", "roberta_large")):
        roberta = Namespace()
        ARCH_CONFIG_REGISTRY[stock](roberta)
        bit = configured(ours)
        flags = (*MASKED_LANGUAGE_MODEL.flags, "dropout", "attention_dropout", "activation_dropout")
        assert [str(getattr(roberta, flag)) for flag in flags] == [str(bit[flag]) for flag in flags]


def test_architecture_and_model_names_are_registered_once():
    for model, archs in (
        ("transformer_lm", architectures.LANGUAGE_MODELS),
        ("residual_transformer_lm", architectures.RESIDUAL_LANGUAGE_MODELS),
        ("energy_transformer_unit", architectures.UNIDIRECTIONAL),
        ("energy_transformer_bit", architectures.BIDIRECTIONAL),
    ):
        assert {ARCH_MODEL_NAME_REGISTRY[arch] for arch in archs} == {model}
        assert all(ARCH_MODEL_REGISTRY[arch] is ARCH_MODEL_REGISTRY[model] for arch in archs)


@pytest.mark.parametrize("arch", ["unit_tiny", "bit_tiny"])
def test_a_network_from_the_command_line(arch):
    torch.manual_seed(0)
    model = build_model(configured(arch, "--dropout", "0.3"), TASK)
    assert model(sequences(5, 2)).shape == (2,)
    assert model.trunk.dropout_module.p == 0.3
