"""Starting from a checkpoint: what is copied, what is refused, and that it is needed only once."""
from argparse import Namespace

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from fairseq.models import build_model
from omegaconf import OmegaConf

from fairseq_earm.errors import UsageError
from fairseq_earm.models.energy_init import UNTRAINED
from tests.models.commands import LANGUAGE_MODEL, MASKED_LANGUAGE_MODEL, train
from tests.models.networks import config, network, sequences

BOTH = pytest.mark.parametrize("name", ["unit", "bit"])
SOURCES = {"unit": "lm", "bit": "mlm"}


def task(text):
    return Namespace(source_dictionary=Dictionary.load(str(text.data / "dict.txt")))


def start(name, text, path=None, **settings):
    return network(name, task=task(text), energy_init=str(path or getattr(text, SOURCES[name])), **settings)


def pretrained(path):
    models, _, _ = checkpoint_utils.load_model_ensemble_and_task([str(path)])
    return models[0].double().eval()


def test_unit_reads_as_its_language_model_does(text):
    model, lm = start("unit", text), pretrained(text.lm)
    tokens = sequences(6, 6)
    read = torch.cat([torch.full((2, 1), model.start), tokens], 1)
    torch.testing.assert_close(model.states(tokens)[0], lm.decoder(read, features_only=True)[0])


def test_bit_reads_as_its_roberta_does(text):
    model, roberta = start("bit", text), pretrained(text.mlm)
    tokens = sequences(6, 3)
    read = torch.cat([torch.full((2, 1), model.start), tokens], 1)
    states, real = model.states(tokens)
    torch.testing.assert_close(states[real], roberta(read, features_only=True)[0][real])


@pytest.mark.parametrize("extra", [{}, {"layernorm_embedding": True}], ids=["roberta_prenorm", "--encoder-normalize-before"])
def test_bit_reads_as_robertas_that_normalise_before(text, tmp_path, extra):
    flags = ["--encoder-normalize-before"] if extra else ["--arch", "roberta_prenorm"]
    mlm = train(text.data, tmp_path, *MASKED_LANGUAGE_MODEL, *flags, "--max-update", 2)
    model, roberta = start("bit", text, mlm, encoder_normalize_before=True, **extra), pretrained(mlm)
    tokens = sequences(6, 3)
    read = torch.cat([torch.full((2, 1), model.start), tokens], 1)
    states, real = model.states(tokens)
    torch.testing.assert_close(states[real], roberta(read, features_only=True)[0][real])
    if extra:
        assert "--layernorm-embedding is False here and True in the checkpoint" in refused("bit", text, path=mlm, encoder_normalize_before=True)


@BOTH
def test_every_parameter_of_the_trunk_is_copied(name, text):
    prefix = {"unit": "decoder.", "bit": "encoder.sentence_encoder."}[name]
    saved = torch.load(getattr(text, SOURCES[name]), weights_only=False)["model"]
    fresh, model = (dict(m.named_parameters()) for m in (network(name, task=task(text)), start(name, text)))
    copied = [key for key in model if key.startswith("trunk.") and not UNTRAINED.search(key)]
    assert len(copied) > 30
    for key in copied:
        value = saved[prefix + key[len("trunk.") :]].double()
        assert torch.equal(model[key], value[: len(model[key])])
        assert not torch.equal(fresh[key], model[key])


def test_only_the_mask_of_a_masked_language_model_is_left_out(text):
    saved = torch.load(text.mlm, weights_only=False)["model"]["encoder.sentence_encoder.embed_tokens.weight"]
    assert len(saved) == start("bit", text).vocabulary_size + 1


def rewritten(path, folder, change):
    """A copy of a checkpoint with something changed."""
    state = torch.load(path, weights_only=False)
    change(state)
    torch.save(state, folder / "changed.pt")
    return folder / "changed.pt"


def test_names_of_published_roberta_checkpoints(text, tmp_path):
    def as_published(state):
        old = {}
        for key, value in state["model"].items():
            key = key.replace("encoder.", "decoder.", 1).replace(".layernorm_embedding.", ".emb_layer_norm.")
            old[key] = value
        for layer in range(2):
            prefix = f"decoder.sentence_encoder.layers.{layer}.self_attn."
            for kind in ("weight", "bias"):
                old[f"{prefix}in_proj_{kind}"] = torch.cat([old.pop(f"{prefix}{part}_proj.{kind}") for part in "qkv"])
        del old["decoder.sentence_encoder.version"]
        state["model"] = old

    published = start("bit", text, rewritten(text.mlm, tmp_path, as_published))
    tokens = sequences(6, 3)
    torch.testing.assert_close(published(tokens), start("bit", text)(tokens))


def test_half_precision_checkpoint(text, tmp_path):
    def halve(state):
        state["model"] = {key: value.half() for key, value in state["model"].items()}

    model, whole = start("unit", text, rewritten(text.lm, tmp_path, halve)), start("unit", text)
    assert {value.dtype for value in model.parameters()} == {torch.float64}
    assert torch.equal(model.trunk.layers[0].fc1.weight, whole.trunk.layers[0].fc1.weight.half().double())


def refused(name, text, **settings):
    with pytest.raises(UsageError) as error:
        start(name, text, **settings)
    message = str(error.value)
    assert message.startswith("fairseq-earm: error: --energy-init ") and "\n" not in message
    return message


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"decoder_layers": 3}, "--decoder-layers is 3 here and 2 in the checkpoint"),
        ({"decoder_embed_dim": 8}, "--decoder-embed-dim is 8 here and 16 in the checkpoint"),
        ({"decoder_ffn_embed_dim": 64}, "--decoder-ffn-embed-dim is 64 here and 32 in the checkpoint"),
        ({"decoder_attention_heads": 4}, "--decoder-attention-heads is 4 here and 2 in the checkpoint"),
        ({"decoder_normalize_before": False}, "--decoder-normalize-before is False here and True in the checkpoint"),
        ({"decoder_learned_pos": True}, "--decoder-learned-pos is True here and False in the checkpoint"),
        ({"activation_fn": "gelu"}, "--activation-fn is gelu here and relu in the checkpoint"),
        ({"decoder_input_dim": 8}, "--decoder-input-dim is 8 here and 16 in the checkpoint"),
    ],
)
def test_unit_of_another_shape(settings, words, text):
    assert words in refused("unit", text, **settings)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"encoder_layers": 1}, "--encoder-layers is 1 here and 2 in the checkpoint"),
        ({"encoder_attention_heads": 1}, "--encoder-attention-heads is 1 here and 2 in the checkpoint"),
        ({"encoder_normalize_before": True}, "--encoder-normalize-before is True here and False in the checkpoint"),
        ({"max_positions": 20}, "--max-positions is 20 here and 12 in the checkpoint"),
    ],
)
def test_bit_of_another_shape(settings, words, text):
    assert words in refused("bit", text, **settings)


def test_a_parameter_that_no_flag_explains(text, tmp_path):
    def add(state):
        state["model"]["decoder.layers.1.c_attn"] = torch.ones(2)

    path = rewritten(text.lm, tmp_path, add)
    assert "trunk.layers.1.c_attn is missing here and (2,) in the checkpoint" in refused("unit", text, path=path)


def test_checkpoints_of_another_kind(text, tiny):
    assert "residual_transformer_lm_tiny without plain word embeddings" in refused("unit", text, path=text.ralm)
    assert "a roberta, and this network starts from a transformer_lm" in refused("unit", text, path=text.mlm)
    words = "a transformer_lm_residual_tiny, and this network starts from a roberta"
    assert words in refused("bit", text, path=text.lm)
    assert "a transformer, and" in refused("unit", text, path=tiny.a)


@BOTH
def test_another_vocabulary(name, text, tmp_path):
    def shorten(state):
        for key, value in state["model"].items():
            if key.endswith("embed_tokens.weight"):
                state["model"][key] = value[:10]

    path = rewritten(getattr(text, SOURCES[name]), tmp_path, shorten)
    size = len(task(text).source_dictionary)
    assert f"its vocabulary has 10 symbols and the data's {size}" in refused(name, text, path=path)


def test_no_checkpoint_at_all(text, tmp_path):
    assert "there is no such file" in refused("unit", text, path=tmp_path / "nothing.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    assert "no checkpoint of fairseq-train" in refused("unit", text, path=tmp_path / "text.pt")
    torch.save({"some": "state"}, tmp_path / "state.pt")
    assert "no checkpoint of fairseq-train" in refused("bit", text, path=tmp_path / "state.pt")


def test_projected_embeddings_of_a_plain_transformer_lm(text, tmp_path):
    """`--arch transformer_lm` without more has embeddings of 512 whatever the size of its states."""
    sizes = LANGUAGE_MODEL[LANGUAGE_MODEL.index("transformer_lm_residual_tiny") + 1 :]
    plain = [*LANGUAGE_MODEL[: -len(sizes) - 1], "transformer_lm", *sizes]
    path = train(text.data, tmp_path, *plain)
    settings = {"decoder_normalize_before": False, "decoder_input_dim": 512}
    model, lm = start("unit", text, path, **settings), pretrained(path)
    tokens = sequences(6)
    lm.decoder.project_out_dim = None
    read = torch.cat([torch.full((1, 1), model.start), tokens], 1)
    torch.testing.assert_close(model.states(tokens)[0], lm.decoder(read, features_only=True)[0])
    words = "--decoder-input-dim is 16 here and 512 in the checkpoint"
    assert words in refused("unit", text, path=path, decoder_normalize_before=False)


@BOTH
@pytest.mark.parametrize("arch", ["own", "named"])
def test_the_checkpoint_is_needed_once(name, arch, text):
    """The trainer saves the configuration that the model was built from: it must not name the file any more."""
    model_name = f"energy_transformer_{name}" if arch == "own" else f"{name}_tiny"
    of_model = OmegaConf.structured(config(name, energy_init=str(getattr(text, SOURCES[name]))))
    whole = OmegaConf.create({"model": of_model})
    OmegaConf.set_struct(whole, True)
    whole.model._name = model_name
    first = build_model(whole.model, task(text))
    assert whole.model.energy_init is None
    again = build_model(whole.model, task(text))
    again.load_state_dict(first.state_dict(), model_cfg=whole.model)
    assert torch.equal(first.eval()(sequences(5)), again.eval()(sequences(5)))
