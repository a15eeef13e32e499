"""Quick decoding against fairseq's own, step by step."""
from __future__ import annotations

import pytest
import torch

from fairseq_earm.sampling import transformer_steps
from fairseq_earm.sampling.decoding import StockSteps, decode
from fairseq_earm.sampling.scheduled import Predictions, scheduled_sampling
from fairseq_earm.sampling.transformer_source import is_plain, read_source, source_of
from fairseq_earm.sampling.transformer_steps import FIRST_STEPS, TransformerSteps
from tests.tiny_language import ADAPTIVE, TIED, tiny_language_model
from tests.tiny_model import tiny_batch, tiny_model

TRANSLATION = {
    "as it comes": {},
    "normalised before": {"decoder_normalize_before": True, "encoder_normalize_before": True},
    "learned positions": {"learned_positions": True},
    "no positions": {"no_token_positional_embeddings": True},
    "normalised embedding": {"layernorm_embedding": True, "no_scale_embedding": True},
    "other widths": {"decoder_input_dim": 4, "decoder_output_dim": 4},
    "gelu": {"activation_fn": "gelu"},
    "adaptive softmax": {"words": 3, **ADAPTIVE},
}
LANGUAGE = {"as it comes": {}, "learned positions": {"decoder_learned_pos": True}, "adaptive": {"words": 3, **TIED}}


def both(model, inputs=None):
    """The same model decoded in both ways."""
    assert TransformerSteps.knows(model.decoder)
    if inputs is None:
        return TransformerSteps(model.decoder), StockSteps(model.decoder)
    assert is_plain(model.encoder)
    source = read_source(model.encoder, inputs["src_tokens"])
    return TransformerSteps(model.decoder, source), StockSteps(model.decoder, model.encoder, model.encoder(**inputs))


def step(ways, read):
    """Logits of both ways, which must agree; the same tokens are then read by both."""
    quick, plain = (way.next_logits(read) for way in ways)
    assert quick.dtype == plain.dtype and torch.allclose(quick, plain, rtol=1e-6, atol=1e-6)  # attention is float32 in both
    words = quick.size(-1)
    return torch.cat([read, torch.randint(2, words, (read.size(0), 1))], 1)


def select(ways, read, rows):
    for way in ways:
        way.select(torch.tensor(rows))
    return read[rows]


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(3, 2, 4), (3, 3, 3)], ids=["padded sources", "no padding"])
@pytest.mark.parametrize("settings", TRANSLATION.values(), ids=TRANSLATION)
@pytest.mark.parametrize("wide", [transformer_steps.WIDE, 1], ids=["narrow heads", "wide heads"])
def test_translation_logits_are_fairseqs(settings, lengths, wide, monkeypatch):
    monkeypatch.setattr(transformer_steps, "WIDE", wide)
    torch.manual_seed(3)
    model = tiny_model(**settings)
    ways = both(model, tiny_batch(model, lengths))
    read = select(ways, torch.full((3, 1), model.decoder.dictionary.eos()), [0, 0, 1, 1, 1, 2])
    for rows in ([0, 1, 2, 3, 4, 5], [5, 1, 4, 3], [0, 1, 2], [2, 1]):
        read = select(ways, step(ways, step(ways, read)), rows)
    for _ in range(FIRST_STEPS):  # the cache grows
        read = step(ways, read)
    assert read.size(1) > FIRST_STEPS + 1


@torch.no_grad()
@pytest.mark.parametrize("given", [0, 1, 5])
@pytest.mark.parametrize("settings", LANGUAGE.values(), ids=LANGUAGE)
def test_language_model_logits_are_fairseqs_after_a_prefix(settings, given):
    torch.manual_seed(3)
    model = tiny_language_model(**settings)
    ways = both(model)
    read = torch.randint(2, 6, (3, given + 1))
    for way in ways:
        way.prefill(read[:, :-1])
    read = select(ways, step(ways, read), [0, 0, 1, 2, 2])
    for _ in range(3):
        read = step(ways, read)
    read = step(ways, select(ways, read, [4, 1]))
    step(ways, read)


@torch.no_grad()
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_other_precisions(dtype, tolerance):
    model = tiny_model(words=9).to(dtype)
    ways = both(model, tiny_batch(model, (3, 2, 4)))
    read = torch.randint(4, 9, (3, 1))
    for _ in range(5):
        quick, plain = (way.next_logits(read) for way in ways)
        assert quick.dtype == plain.dtype == torch.float32
        assert torch.allclose(quick, plain, rtol=tolerance, atol=tolerance)
        read = torch.cat([read, torch.randint(4, 9, (3, 1))], 1)


@torch.no_grad()
def test_autocast_is_as_it_is_for_fairseq():
    model = tiny_model(words=9).float()
    with torch.autocast("cpu", torch.bfloat16):
        ways = both(model, tiny_batch(model, (3, 2, 4)))
        read = torch.randint(4, 9, (3, 1))
        for _ in range(4):
            quick, plain = (way.next_logits(read) for way in ways)
            assert torch.allclose(quick, plain, rtol=0.1, atol=0.1)
            read = torch.cat([read, torch.randint(4, 9, (3, 1))], 1)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(3, 2, 4), (3, 3, 3), (90, 40, 71)], ids=["padded", "no padding", "several blocks"])
@pytest.mark.parametrize("name", ["as it comes", "normalised before", "normalised embedding"])
def test_the_source_is_read_as_fairseq_reads_it(name, lengths):
    model = tiny_model(words=9, **TRANSLATION[name])
    inputs = tiny_batch(model, lengths)
    output = model.encoder(**inputs)
    source = read_source(model.encoder, inputs["src_tokens"])
    assert torch.equal(source.padding, output["encoder_padding_mask"][0])
    assert torch.allclose(source.spread(lambda states: states)[~source.padding], output["encoder_out"][0].transpose(0, 1)[~source.padding])
    hook = model.encoder.register_forward_hook(lambda *_: None)
    assert not is_plain(model.encoder)
    other = decode(model.decoder, model.encoder, inputs)  # its own output, read by the quick decoder
    assert isinstance(other, TransformerSteps)
    assert torch.allclose(source_of(output).states, source.states)
    hook.remove()
    output["encoder_padding_mask"] = [None]
    assert torch.allclose(source_of(output).states.view(-1, 8), output["encoder_out"][0].transpose(0, 1).reshape(-1, 8))
    assert source_of({"encoder_out": []}) is None


def test_what_is_not_fairseqs_own_is_decoded_by_fairseq():
    changes = {
        "training": lambda model: model.train(),
        "hook": lambda model: model.decoder.layers[0].fc1.register_forward_hook(lambda *_: None),
        "earlier hook": lambda model: model.decoder.layers[0].register_forward_pre_hook(lambda *_: None),
        "another method": lambda model: setattr(model.decoder, "extract_features", model.decoder.extract_features),
        "pruned heads": lambda model: model.decoder.layers[0].self_attn._set_skip_embed_dim_check(),
        "forward": lambda model: setattr(model.decoder, "forward", model.decoder.forward),
        "decoder": lambda model: setattr(model.decoder, "__class__", type("Mine", (type(model.decoder),), {})),
        "layer": lambda model: setattr(model.decoder.layers[0], "__class__", type("Mine", (type(model.decoder.layers[0]),), {})),
        "attention": lambda model: setattr(model.decoder.layers[0].self_attn, "add_zero_attn", True),
        "linear": lambda model: torch.nn.utils.parametrizations.weight_norm(model.decoder.layers[0].fc1),
        "dropout": lambda model: setattr(model.decoder.dropout_module, "apply_during_inference", True),
    }
    for name, change in changes.items():
        model = tiny_model()
        assert TransformerSteps.knows(model.decoder)
        change(model)
        assert not TransformerSteps.knows(model.decoder), name
    for settings in ({"cross_self_attention": True}, {"quant_noise_pq": 0.1}, {"scale_attn": True}, {"scale_heads": True}):
        assert not TransformerSteps.knows(tiny_model(**settings).decoder), settings


def test_scheduled_sampling_leaves_drawing_alone():
    """A model is decoded in the same way with it and without, and so draws the same."""
    model = tiny_model()
    with scheduled_sampling(model, 0.5, Predictions()):
        assert "forward" in vars(model.decoder) and TransformerSteps.knows(model.decoder)


def test_nothing_is_drawn_to_look_at_a_model_with_layerdrop():
    model = tiny_model(decoder_layerdrop=0.5, encoder_layerdrop=0.5)
    before = torch.get_rng_state()
    assert TransformerSteps.knows(model.decoder) and is_plain(model.encoder)
    with torch.no_grad():
        read_source(model.encoder, tiny_batch(model)["src_tokens"])
    assert torch.equal(torch.get_rng_state(), before)
