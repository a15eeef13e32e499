"""Transformer-XL against its definition, its memory, its incremental decoding and its size."""
from argparse import Namespace

import pytest
import torch
from fairseq.models import build_model
from omegaconf import OmegaConf

from fairseq_earm.compat import computes_half_on_cpu
from fairseq_earm.errors import UsageError
from fairseq_earm.models.carried_memory import CarriedMemory
from fairseq_earm.models.transformer_xl import TransformerXLConfig, TransformerXLLanguageModel
from fairseq_earm.sampling.continuation import ContinuationSampler, score_continuations
from fairseq_earm.sampling.isolation import isolated
from fairseq_earm.sampling.prefill import prefill
from tests.oracles import transformer_xl as oracle
from tests.tiny_model import tiny_dictionary

DICTIONARY = tiny_dictionary(6)
SMALL = {"decoder_layers": 2, "decoder_embed_dim": 12, "decoder_ffn_embed_dim": 20, "decoder_attention_heads": 3, "dropout": 0.0}
ADAPTIVE = {"adaptive_softmax_cutoff": "5,7", "adaptive_softmax_factor": 2.0}
TIED = {**ADAPTIVE, "adaptive_input": True, "adaptive_input_cutoff": "5,7", "adaptive_input_factor": 2.0,
        "tie_adaptive_weights": True, "tie_adaptive_proj": True}


def language_model(seed=0, dtype=torch.float64, **settings):
    """A small model all of whose parameters matter."""
    torch.manual_seed(seed)
    task = Namespace(source_dictionary=DICTIONARY, target_dictionary=DICTIONARY)
    model = TransformerXLLanguageModel.build_model(TransformerXLConfig(**{**SMALL, **settings}), task)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm.weight" in name else 0.0, 0.5)
    return model.to(dtype).eval()


def random_tokens(rows, length, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(DICTIONARY.nspecial, len(DICTIONARY), (rows, length), generator=generator)


def batches(*lengths, rows=2):
    return [random_tokens(rows, length, seed) for seed, length in enumerate(lengths)]


def lend(decoder):
    decoder.carried = CarriedMemory()
    return decoder.carried


def read_on(decoder, segments):
    """Logits of each batch, every one the continuation of the one before."""
    found = []
    for step, tokens in enumerate(segments):
        decoder.carried.begin(torch.arange(len(tokens)) * 100 + step)
        found.append(decoder(tokens)[0])
    return found


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("mem_len", [0, 3, 5, 50])
def test_by_definition(mem_len, dtype, tolerance):
    model = language_model(dtype=dtype, mem_len=mem_len)
    segments = batches(4, 6, 2, 1, 5)
    lend(model.decoder)
    found = read_on(model.decoder, segments)
    for row in range(2):
        expected = oracle.read_text(model.double().decoder, [tokens[row] for tokens in segments], mem_len)
        for logits, exact in zip(found, expected):
            assert exact.std() > 0.5
            torch.testing.assert_close(logits[row].double(), exact, rtol=tolerance, atol=tolerance)
        model.to(dtype)


@pytest.mark.parametrize("settings", [ADAPTIVE, TIED], ids=["adaptive", "tied"])
def test_adaptive_softmax(settings):
    model = language_model(mem_len=3, **settings)
    segments = batches(4, 3)
    lend(model.decoder)
    for step, states in enumerate(read_on(model.decoder, segments)):
        expected = torch.stack([oracle.read_text(model.decoder, [s[row] for s in segments], 3)[step] for row in range(2)])
        torch.testing.assert_close(states, expected, rtol=1e-12, atol=1e-12)
        log_probs = model.get_normalized_probs((states, None), log_probs=True)
        torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(states.shape[:2]).double(), rtol=1e-6, atol=1e-6)


def test_a_text_in_segments_is_the_text():
    model = language_model(mem_len=11)
    segments = batches(4, 4, 3, 1)
    lend(model.decoder)
    in_segments = torch.cat(read_on(model.decoder, segments), 1)
    model.decoder.carried = None
    torch.testing.assert_close(in_segments, model(torch.cat(segments, 1))[0], rtol=1e-12, atol=1e-12)


def test_without_a_memory_segments_stand_alone():
    model = language_model()
    first, second = batches(4, 4)
    alone = model(second)[0]
    model(first)
    assert torch.equal(model(second)[0], alone)
    assert model.decoder.carried is None
    lend(model.decoder)
    assert (read_on(model.decoder, [first, second])[1] - alone).abs().max() > 0.1


def test_no_token_sees_a_later_one():
    model = language_model(mem_len=4)
    first, second = batches(5, 6)
    for changed in range(6):
        other = second.clone()
        other[:, changed] = DICTIONARY.nspecial + (other[:, changed] - DICTIONARY.nspecial + 1) % 6
        outcomes = []
        for tokens in (second, other):
            lend(model.decoder)
            outcomes.append(read_on(model.decoder, [first, tokens])[1])
        difference = (outcomes[0] - outcomes[1]).abs().amax((0, 2))
        assert bool(difference[:changed].eq(0).all()) and bool(difference[changed:].gt(0).all())


def test_what_memory_reaches():
    """A layer looks back at mem_len states, and these have looked back at as many: old tokens count, their gradient does not."""
    model = language_model(mem_len=2)
    first, second, third = batches(3, 2, 2)
    other = first.clone()
    other[:, -2] = other[:, -2].flip(0)
    assert not torch.equal(other, first)
    outcomes = []
    for tokens in (first, other):
        lend(model.decoder)
        outcomes.append(read_on(model.decoder, [tokens, second, third]))
    assert not torch.equal(outcomes[0][1], outcomes[1][1]) and not torch.equal(outcomes[0][2], outcomes[1][2])
    assert not model.decoder.carried.left.requires_grad
    assert model.decoder.carried.left.shape == (2, 2, 2, 12)


def after_two_batches(rows=3, **settings):
    """A decoder in the midst of a text, its batch begun and not yet read, and that batch."""
    model = language_model(mem_len=4, **settings)
    *before, tokens = batches(4, 3, 6, rows=rows)
    lend(model.decoder)
    read_on(model.decoder, before)
    model.decoder.carried.begin(torch.arange(rows) * 100 + 2)
    return model, tokens


def unchanged(decoder):
    left = decoder.carried.left.clone()
    return lambda: torch.equal(decoder.carried.left, left)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("settings", [{}, TIED], ids=["softmax", "adaptive"])
@torch.no_grad()
def test_step_by_step_as_in_one_pass(settings, dtype, tolerance):
    model, tokens = after_two_batches(dtype=dtype, **settings)
    same, whole, cache = unchanged(model.decoder), None, {}
    for end in range(1, 7):
        step = model.decoder(tokens[:, :end], incremental_state=cache)[0]
        assert step.shape[:2] == (3, 1) and same()
        whole = model.decoder(tokens, memory=model.decoder.select_memory(torch.arange(3)))[0] if whole is None else whole
        torch.testing.assert_close(step[:, 0], whole[:, end - 1], rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_a_prefix_may_be_read_at_once():
    model, tokens = after_two_batches()
    whole, cache = model.decoder(tokens, memory=model.decoder.select_memory(torch.arange(3)))[0], {}
    for start, end in ((0, 3), (3, 5), (5, 6)):
        found = model.decoder(tokens[:, :end], incremental_state=cache)[0]
        torch.testing.assert_close(found, whole[:, start:end], rtol=1e-12, atol=1e-12)
    cache = {}
    for step in range(6):  # a caller that passes each token alone
        found = model.decoder(tokens[:, step : step + 1], incremental_state=cache)[0]
        torch.testing.assert_close(found[:, 0], whole[:, step], rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_prefill_is_one_call(monkeypatch):
    model, tokens = after_two_batches()
    whole, cache, calls = model.decoder(tokens, memory=model.decoder.select_memory(torch.arange(3)))[0], {}, []
    extract = model.decoder.extract_features
    monkeypatch.setattr(model.decoder, "extract_features", lambda *args, **given: calls.append(1) or extract(*args, **given))
    prefill(model.decoder, tokens[:, :5], cache)
    assert len(calls) == 1
    last = model.decoder(tokens, incremental_state=cache)[0]
    torch.testing.assert_close(last[:, 0], whole[:, 5], rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_reordered_in_the_middle():
    model, tokens = after_two_batches()
    order, cache = torch.tensor([2, 0, 0, 1]), {}
    for end in (1, 2):
        model.decoder(tokens[:, :end], incremental_state=cache)
    model.decoder.reorder_incremental_state_scripting(cache, order)
    others = torch.cat([tokens[order, :2], random_tokens(4, 3, seed=9)], 1)
    whole = model.decoder(others, memory=model.decoder.select_memory(order))[0]
    for end in (3, 4, 5):
        step = model.decoder(others[:, :end], incremental_state=cache)[0]
        torch.testing.assert_close(step[:, 0], whole[:, end - 1], rtol=1e-12, atol=1e-12)


def test_reordering_what_was_never_read():
    model = language_model()
    model.decoder.reorder_incremental_state_scripting({}, torch.tensor([0]))


def test_all_passes_over_a_batch_read_the_same():
    """Negatives are drawn before the data is read and scored after it; a batch may be read twice."""
    model, tokens = after_two_batches()
    decoder = model.decoder
    before = decoder.select_memory(torch.tensor([1, 1, 2]))
    first = decoder(tokens)[0]
    left = decoder.carried.left
    assert torch.equal(decoder.select_memory(torch.tensor([1, 1, 2])), before)
    negatives = decoder(tokens[[1, 1, 2]], memory=before)[0]
    torch.testing.assert_close(negatives, first[[1, 1, 2]], rtol=1e-12, atol=1e-12)
    assert decoder.carried.left is left
    decoder.carried.begin(torch.arange(3) * 100 + 2)  # the same batch once more
    assert torch.equal(decoder(tokens)[0], first)
    decoder.carried.begin(torch.arange(3) * 100 + 3)
    assert torch.equal(decoder.select_memory(torch.arange(3)), left)


def test_an_empty_memory_given_is_no_memory_to_update():
    model = language_model()
    carried = lend(model.decoder)
    carried.begin(torch.tensor([0, 9]))
    [tokens] = batches(4)
    empty = model.decoder.select_memory(torch.tensor([1, 0, 1]))
    assert empty.shape == (2, 3, 0, 12)
    assert torch.equal(model.decoder(tokens, memory=empty[:, :2])[0], model(tokens)[0])
    carried.left = None
    model.decoder(tokens, memory=empty[:, :2])
    assert carried.left is None
    model.decoder.carried = None
    assert model.decoder.select_memory(torch.tensor([0])).shape == (2, 1, 0, 12)


def test_a_smaller_batch_is_the_first_rows():
    model, tokens = after_two_batches()
    whole = model(tokens)[0]
    model.decoder.carried.begin(torch.arange(3) * 100 + 2)
    torch.testing.assert_close(model(tokens[:2])[0], whole[:2], rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="4 rows of tokens, and a memory of 3"):
        model(random_tokens(4, 2))


def test_samples_continue_the_memory():
    """Drawn in eval mode in the middle of a training step; log q is that of a teacher-forced pass from the same memory."""
    model, tokens = after_two_batches()
    model.train()
    same = unchanged(model.decoder)
    with isolated(model, tokens):
        samples = ContinuationSampler(DICTIONARY, 5).go_on(model, tokens[:, :2], 2)
    assert same() and model.training
    read = torch.cat([tokens[:, :2][samples.sources], samples.tokens[:, :-1]], 1)
    logits = model.decoder(read, memory=model.decoder.select_memory(samples.sources))[0][:, 1:]
    logits[..., DICTIONARY.pad()] = -float("inf")
    exact = logits.log_softmax(-1).gather(-1, samples.tokens.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(samples.log_q.double(), exact, rtol=1e-5, atol=1e-5)
    model.decoder.carried = None
    alone = score_continuations(model.eval(), tokens, 2, pad=DICTIONARY.pad(), eos=DICTIONARY.eos())
    assert alone.isfinite().all()


def test_carried_memory():
    memory = CarriedMemory()
    memory.begin(torch.tensor([0, 10, 20]))
    assert memory.read is None
    memory.left = "first"
    memory.begin(torch.tensor([0, 10, 20]))
    assert memory.read is None and memory.left == "first"
    memory.begin(torch.tensor([1, 11, 21]))
    assert memory.read == "first"
    memory.begin(torch.tensor([2, 12]))  # nothing was read meanwhile, for want of device memory
    assert memory.read == "first"
    memory.begin(torch.tensor([3, 12]))
    assert memory.read is None and memory.left is None
    memory.left = "other"
    memory.begin(torch.tensor([4, 13, 22]))
    assert memory.read is None


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.3), (torch.float16, 0.05)])
def test_half_precision(dtype, tolerance):
    if dtype == torch.float16 and not computes_half_on_cpu():
        pytest.skip("this torch computes float16 on GPUs alone")
    model, tokens = after_two_batches()
    exact, memory, cache = model(tokens)[0], model.decoder.carried.read, {}
    model.to(dtype)
    found = model.decoder(tokens, memory=memory)[0]
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=tolerance)
    step = model.decoder(tokens, incremental_state=cache)[0]
    torch.testing.assert_close(step.double(), exact, rtol=0, atol=tolerance)
    model(tokens)
    assert model.decoder.carried.left.dtype == dtype


def test_gradients_reach_every_parameter():
    model = language_model(dropout=0.1, attention_dropout=0.1).train()
    model(random_tokens(2, 5))[0].logsumexp(-1).sum().backward()
    assert all(parameter.grad is not None and bool(parameter.grad.ne(0).any()) for parameter in model.parameters())


def parameters(**settings):
    task = Namespace(source_dictionary=DICTIONARY, target_dictionary=DICTIONARY)
    config = OmegaConf.structured(TransformerXLConfig(_name="transformer_xl_lm", **settings))
    return sum(parameter.numel() for parameter in build_model(config, task).parameters())


def test_the_papers_size():
    """Per layer: five projections, an FFN with biases, two layer normalisations. 151M with WikiText-103's 267,735 words."""
    layer = 5 * 410**2 + 2 * 410 * 2100 + 2100 + 410 + 4 * 410
    expected = 16 * layer + 2 * 410
    words = len(DICTIONARY) * 410
    assert parameters(share_decoder_input_output_embed=True) == expected + words
    assert expected + 267735 * 410 == pytest.approx(151e6, rel=0.005)


def test_shared_and_separate_embeddings():
    assert parameters(**SMALL) - parameters(**SMALL, share_decoder_input_output_embed=True) == len(DICTIONARY) * 12


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"decoder_embed_dim": 410, "decoder_attention_heads": 8}, "--decoder-embed-dim 410"),
        ({"decoder_embed_dim": 9, "decoder_attention_heads": 3}, "--decoder-embed-dim 9"),
        ({"mem_len": -1}, "--mem-len -1"),
        ({"adaptive_softmax_cutoff": "5,700"}, "--adaptive-softmax-cutoff 5,700"),
        ({"decoder_layers": 0}, "--decoder-layers 0: give at least 1"),
        ({"adaptive_softmax_cutoff": "7,5"}, "--adaptive-softmax-cutoff 7,5: give numbers of words, each larger"),
        ({"adaptive_softmax_cutoff": "five"}, "--adaptive-softmax-cutoff five: give numbers of words"),
        ({"adaptive_input": True}, "--adaptive-input-cutoff"),
        ({"adaptive_input": True, "adaptive_input_cutoff": "5,700"}, "--adaptive-input-cutoff 5,700"),
        ({**TIED, "share_decoder_input_output_embed": True}, "--share-decoder-input-output-embed"),
        ({**ADAPTIVE, "share_decoder_input_output_embed": True}, "--share-decoder-input-output-embed"),
        ({"adaptive_input_cutoff": "5,7"}, "--adaptive-input-cutoff: no effect without --adaptive-input"),
        ({**TIED, "tie_adaptive_weights": False}, "--tie-adaptive-proj: no effect without --tie-adaptive-weights"),
        ({**TIED, "adaptive_input_factor": 4.0}, "--tie-adaptive-weights"),
        ({**ADAPTIVE, "tie_adaptive_weights": True}, "--tie-adaptive-weights"),
    ],
)
def test_what_fits_no_model_is_refused(settings, message):
    with pytest.raises(UsageError) as error:
        language_model(**settings)
    assert message in str(error.value) and "\n" not in str(error.value)
