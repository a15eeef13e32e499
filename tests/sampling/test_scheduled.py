"""Scheduled sampling's two passes against the same by definition, on models in float64."""
from __future__ import annotations

import math
from argparse import Namespace

import pytest
import torch
from fairseq.distributed import ModuleProxyWrapper
from fairseq.models import FairseqDecoder, FairseqLanguageModel
from fairseq.models.lstm import LSTMModel, base_architecture
from fairseq.models.transformer_lm import TransformerLanguageModel, base_lm_architecture
from fairseq.modules import FairseqDropout
from torch import nn

from fairseq_earm.errors import UsageError
from fairseq_earm.models.carried_memory import CarriedMemory
from fairseq_earm.models.transformer_xl import TransformerXLConfig, TransformerXLLanguageModel
from fairseq_earm.sampling import isolation
from fairseq_earm.sampling.joint_forward import forward_with_negatives
from fairseq_earm.sampling.scheduled import (
    Predictions, Schedule, check_decoder, keep_teacher_forced, replaceable, scheduled_sampling, teacher_forced,
)
from tests.tiny_language import tiny_language_model
from tests.tiny_model import tiny_batch, tiny_dictionary, tiny_model

PAD, EOS = 1, 2
KINDS = ("argmax", "sample", "topk-mix")
ALMOST_ONE = 1 - 1e-12  # p at which there are two passes, and nothing is replaced


@pytest.mark.parametrize("schedule, values", [
    (Schedule("constant", 0.3), {0: 0.3, 99: 0.3}),
    (Schedule("constant", 0.3, start_update=5), {4: 1, 5: 0.3}),
    (Schedule("linear", 1.0, 0.2, decay_updates=4, start_update=10), {0: 1, 9: 1, 10: 1, 11: 0.8, 12: 0.6, 14: 0.2, 99: 0.2}),
    (Schedule("linear", 0.9, 0.0, decay_updates=3), {0: 0.9, 1: 0.6, 2: 0.3, 3: 0, 4: 0}),
    (Schedule("exponential", 1.0, rate=0.5), {0: 1, 1: 0.5, 3: 0.125}),
    (Schedule("exponential", 0.8, 0.15, rate=0.5, start_update=1), {0: 1, 1: 0.8, 2: 0.4, 3: 0.2, 4: 0.15, 10**6: 0.15}),
    (Schedule("inverse-sigmoid", rate=10.0), {0: 10 / 11, 10: 10 / (10 + math.e), 25: 10 / (10 + math.exp(2.5)), 10**9: 0}),
    (Schedule("inverse-sigmoid", 0.5, 0.1, rate=1.0), {0: 0.25, 1: 0.5 / (1 + math.e), 2: 0.1}),
])
def test_schedules_have_the_values_of_their_formulas(schedule, values):
    assert {update: schedule.probability(update) for update in values} == pytest.approx(values, abs=1e-12)


def test_start_padding_and_what_is_given_are_never_replaced():
    tokens = torch.tensor([[EOS, 4, 5, EOS, 4], [EOS, 4, 5, PAD, PAD], [PAD, PAD, EOS, 4, 5]])
    assert replaceable(tokens, PAD).tolist() == [[0, 1, 1, 1, 1], [0, 1, 1, 0, 0], [0, 0, 0, 1, 1]]
    assert replaceable(tokens, PAD, given=1).tolist() == [[0, 0, 1, 1, 1], [0, 0, 1, 0, 0], [0, 0, 0, 0, 1]]


def translation(**settings):
    """A model in training mode and a batch whose targets differ in length."""
    model = tiny_model(words=3, **settings).train()
    previous = torch.tensor([[EOS, 4, 5, 4, 6], [EOS, 6, 6, 5, PAD], [EOS, 5, PAD, PAD, PAD]])
    return model, {**tiny_batch(model, lengths=(3, 2, 4)), "prev_output_tokens": previous}


def language(dropout=0.0):
    model = tiny_language_model(words=3).train()
    for module in model.modules():
        if isinstance(module, FairseqDropout):
            module.p = dropout
    tokens = torch.tensor([[EOS, 4, EOS, 4, 6], [6, 6, 6, 5, 4], [EOS, 5, PAD, PAD, PAD]])
    return model, {"src_tokens": tokens, "src_lengths": torch.tensor([5, 5, 2])}


def remembering(dropout=0.0):
    """A Transformer-XL that looks back at two earlier states of each row."""
    settings = {"decoder_layers": 1, "decoder_embed_dim": 8, "decoder_ffn_embed_dim": 16, "decoder_attention_heads": 2}
    dictionary = tiny_dictionary(words=3)
    task = Namespace(source_dictionary=dictionary, target_dictionary=dictionary)
    torch.manual_seed(0)
    model = TransformerXLLanguageModel.build_model(TransformerXLConfig(**settings, dropout=dropout), task).double().train()
    model.decoder.output_projection.weight.data.mul_(4.0)
    model.decoder.carried = CarriedMemory()
    model.decoder.carried.read = torch.randn(1, 3, 2, 8).double()
    return model, language()[1]


FAMILIES = pytest.mark.parametrize("family", [translation, language, remembering])


def fed(net_input):
    """The name of the decoder's input in a batch."""
    return "prev_output_tokens" if "prev_output_tokens" in net_input else "src_tokens"


def predicted(logits, tokens):
    """{(row, step): log-probabilities, padding excepted, of what is read there}, of all steps that may be replaced."""
    found = {}
    for row in range(tokens.size(0)):
        for step in range(1, tokens.size(1)):
            if tokens[row, step] != PAD:
                scores = logits[row, step - 1].clone()
                scores[PAD] = -math.inf
                found[row, step] = scores.log_softmax(-1)
    return found


@FAMILIES
def test_without_teacher_forcing_every_token_is_the_likeliest(family):
    model, net_input = family()
    name = fed(net_input)
    mixed = net_input[name].clone()
    for place, log_probs in predicted(model(**net_input)[0], mixed).items():
        mixed[place] = log_probs.argmax()
    expected = model(**{**net_input, name: mixed})[0]
    assert not torch.allclose(expected, model(**net_input)[0])
    with scheduled_sampling(model, 0.0, Predictions("argmax")):
        assert torch.allclose(model(**net_input)[0], expected, rtol=0, atol=1e-12)


def test_what_is_given_is_read():
    model, net_input = translation()
    reads = tokens_read(model)
    with scheduled_sampling(model, 0.0, Predictions("sample"), given=2):
        model(**net_input)
    assert torch.equal(reads[1][:, :3], net_input["prev_output_tokens"][:, :3])


def tokens_read(model):
    """The tokens that each pass of the decoder embeds, one pass after the other."""
    reads = []
    model.decoder.embed_tokens.register_forward_hook(lambda module, inputs, output: reads.append(inputs[0]))
    return reads


def many(net_input, rows=2000):
    """The first row of a batch, so many times."""
    return {key: value[:1].expand(rows, *value.shape[1:]) for key, value in net_input.items()}


@pytest.mark.parametrize("probability", [0.2, 0.7])
def test_each_token_is_replaced_with_the_same_probability_independently(probability):
    model, net_input = translation()
    net_input = many(net_input)
    model.decoder.output_projection.weight.data[3] = 0  # unknown-word shall be no prediction, hence tell who is replaced
    with torch.no_grad():
        logits = model(**net_input)[0]
    gold = net_input["prev_output_tokens"]
    best = {place: log_probs.argmax() for place, log_probs in predicted(logits[:1], gold[:1]).items()}
    reads = tokens_read(model)
    with scheduled_sampling(model, probability, Predictions("argmax")):
        model(**net_input)
    assert torch.equal(reads[0], gold)
    steps = [step for (_, step), token in best.items() if token != gold[0, step]]
    assert len(steps) >= 2
    replaced = torch.stack([reads[1][:, step].eq(best[0, step]) for step in steps], 1).double()
    kept = torch.stack([reads[1][:, step].eq(gold[0, step]) for step in steps], 1).double()
    assert torch.equal(replaced + kept, torch.ones_like(kept))
    rows, spread = len(gold), math.sqrt(probability * (1 - probability))
    assert torch.all((kept.mean(0) - probability).abs() < 4 * spread / math.sqrt(rows))
    correlation = ((kept - probability).T @ (kept - probability)) / (rows * spread**2)
    assert torch.all((correlation - torch.eye(len(steps))).abs() < 4.5 / math.sqrt(rows) * (1 + 2 * torch.eye(len(steps))))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_samples_have_the_frequencies_of_the_softmax(temperature):
    model, net_input = translation()
    net_input = many(net_input)
    with torch.no_grad():
        logits = model(**net_input)[0][:1] / temperature
    reads = tokens_read(model)
    with scheduled_sampling(model, 0.0, Predictions("sample", temperature=temperature)):
        model(**net_input)
    for (_, step), log_probs in predicted(logits, net_input["prev_output_tokens"][:1]).items():
        expected = log_probs.exp()
        found = torch.bincount(reads[1][:, step], minlength=len(expected)) / len(reads[1])
        assert found[PAD] == 0 and int((expected > 0.02).sum()) > 1
        assert torch.all((found - expected).abs() < 4.5 * (expected * (1 - expected) / len(reads[1])).sqrt() + 1e-3)


class Given(nn.Module):
    """In the place of an embedding: what it is to say."""

    def __init__(self, embedded):
        super().__init__()
        self.embedded = embedded

    def forward(self, tokens):
        return self.embedded


def mixed_by_definition(model, net_input, topk, temperature, through):
    """The second pass's logits where every token is replaced, from embeddings mixed one step after the other."""
    tokens, embed = net_input[fed(net_input)], model.decoder.embed_tokens
    logits = model(**net_input)[0] / temperature
    rows = [[embed(token) for token in row] for row in tokens]
    for (row, step), log_probs in predicted(logits if through else logits.detach(), tokens).items():
        probabilities = log_probs.exp()
        likeliest = sorted(range(len(probabilities)), key=lambda token: -float(probabilities[token]))[:topk]
        total = sum(probabilities[token] for token in likeliest)
        rows[row][step] = sum(probabilities[token] / total * embed.weight[token] for token in likeliest)
    model.decoder.embed_tokens = Given(torch.stack([torch.stack(row) for row in rows]))
    try:
        return model(**net_input)[0]
    finally:
        model.decoder.embed_tokens = embed


def gradients(model, loss):
    """{name: gradient} of the parameters that have one; passes may share an encoder's graph."""
    model.zero_grad()
    loss.backward(retain_graph=True)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def loss_of(logits):
    """Some loss that tells every logit from the others."""
    return (logits.log_softmax(-1) * torch.arange(logits.numel()).view_as(logits).cos()).sum()


@FAMILIES
@pytest.mark.parametrize("topk, temperature", [(2, 1.0), (6, 0.7)])
@pytest.mark.parametrize("through", [False, True])
def test_embeddings_and_gradients_of_mixtures(family, topk, temperature, through):
    model, net_input = family()
    logits = mixed_by_definition(model, net_input, topk, temperature, through)
    expected = gradients(model, loss_of(logits))
    with scheduled_sampling(model, 0.0, Predictions("topk-mix", topk, temperature, through)):
        found = [model(**net_input)[0]]
        with keep_teacher_forced():
            found.append(model(**net_input)[0])
    for second in found:
        assert torch.allclose(second, logits, rtol=0, atol=1e-12)
        gradient = gradients(model, loss_of(second))
        assert gradient.keys() == expected.keys()
        assert all(torch.allclose(gradient[name], expected[name], rtol=1e-9, atol=1e-10) for name in expected)
    other = gradients(model, loss_of(mixed_by_definition(model, net_input, topk, temperature, not through)))
    assert not all(torch.allclose(other[name], expected[name], rtol=1e-3) for name in expected)


@FAMILIES
@pytest.mark.parametrize("kind", KINDS)
def test_where_nothing_is_replaced_both_passes_are_the_stock_one_to_the_bit(family, kind):
    """They drop out the same, and the draws take none of its random numbers."""
    model, net_input = family(dropout=0.3)
    torch.manual_seed(3)
    stock = model(**net_input)[0]
    expected, state = gradients(model, loss_of(stock)), torch.get_rng_state()
    torch.manual_seed(3)
    with scheduled_sampling(model, ALMOST_ONE, Predictions(kind, topk=3)):
        plain = model(**net_input)[0]
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(3)
        with keep_teacher_forced():
            logits, extra = model(**net_input)
    assert torch.equal(torch.get_rng_state(), state)
    for output in (plain, logits, extra["teacher_forced"]):
        assert torch.equal(output, stock)
        found = gradients(model, loss_of(output))
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert extra["teacher_forced"] is not logits


def test_at_probability_one_there_is_one_pass():
    model, net_input = translation()
    reads = tokens_read(model)
    with scheduled_sampling(model, 1.0, Predictions()), keep_teacher_forced():
        assert "teacher_forced" not in model(**net_input)[1]
    assert len(reads) == 1


def test_draws_repeat_by_the_seed_and_differ_between_workers(monkeypatch):
    model, net_input = translation(dropout=0.3)

    def logits(seed, rank=0):
        monkeypatch.setattr(isolation, "_rank", lambda: rank)
        torch.manual_seed(seed)
        with scheduled_sampling(model, 0.5, Predictions("sample")):
            return model(**net_input)[0]

    assert torch.equal(logits(1), logits(1))
    assert not torch.equal(logits(1), logits(2))
    assert not torch.equal(logits(1), logits(1, rank=1))


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_pass_is_kept_where_asked(kind):
    model, net_input = translation()
    only_pass = model(**net_input)[0]
    expected = gradients(model, loss_of(only_pass))
    with scheduled_sampling(model, 0.0, Predictions(kind, topk=3)):
        plain, extra = model(**net_input)
        assert teacher_forced((plain, extra)) is teacher_forced((plain, None)) is None
        with keep_teacher_forced():
            output = model(**net_input)
        first = teacher_forced(output)
        found = gradients(model, loss_of(first))
    assert torch.equal(first, only_pass) and not torch.allclose(output[0], only_pass)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("predictions, kept, gradient", [
    (Predictions("argmax"), False, False),
    (Predictions("topk-mix", 3), False, False),
    (Predictions("topk-mix", 3, through_first_pass=True), False, True),
    (Predictions("sample"), True, True),
])
def test_the_first_pass_has_a_gradient_only_where_it_is_needed(predictions, kept, gradient):
    model, net_input = translation()
    had = []
    model.decoder.layers[0].register_forward_hook(lambda module, inputs, output: had.append(output[0].requires_grad))
    with scheduled_sampling(model, 0.5, predictions):
        if kept:
            with keep_teacher_forced():
                model(**net_input)
        else:
            model(**net_input)
    assert had == [gradient, True]


class Entering(nn.Module):
    """A model that enters scheduled sampling last, inside of all hooks that were set from outside."""

    def __init__(self, model, *settings):
        super().__init__()
        self.model, self.settings = model, settings
        self.encoder, self.decoder = model.encoder, model.decoder

    def forward(self, **net_input):
        with scheduled_sampling(self.model, *self.settings):
            return self.model(**net_input)


def pair(model, net_input):
    """Net outputs of the data and of negatives, in one forward as E-ARM has it, with the data's first pass."""
    sources = torch.tensor([0, 2, 2])
    negatives = torch.tensor([[EOS, 4, 6], [EOS, 6, PAD], [EOS, 5, 5]])

    def decode(encoder_out):
        return model.decoder(negatives, encoder_out=model.encoder.reorder_encoder_out(encoder_out, sources))

    torch.manual_seed(5)
    with keep_teacher_forced():
        return forward_with_negatives(model, net_input, decode)[:2]


@pytest.mark.parametrize("kind", KINDS)
def test_negatives_are_left_alone(kind):
    model, net_input = translation()
    settings = 0.5, Predictions(kind, topk=3)
    stock = pair(model, net_input)
    with scheduled_sampling(model, *settings):
        outside, twice = pair(model, net_input), pair(model, net_input)
    inside = pair(Entering(model, *settings), net_input)
    for data, negative in (outside, twice, inside):
        assert torch.equal(negative[0], stock[1][0]) and "teacher_forced" not in negative[1]
        assert torch.equal(data[1]["teacher_forced"], stock[0][0])
        assert torch.equal(data[0], outside[0][0]) and not torch.allclose(data[0], stock[0][0])


@pytest.mark.parametrize("predictions", [Predictions("sample"), Predictions("topk-mix", 3, through_first_pass=True)])
def test_torchs_wrapper_finds_all_passes(tmp_path, predictions):
    model, net_input = translation(dropout=0.3)

    def gradient(wrapped):
        with scheduled_sampling(wrapped, 0.5, predictions):
            data, negative = pair(wrapped, net_input)
        return gradients(model, loss_of(data[0]) + loss_of(data[1]["teacher_forced"]) + loss_of(negative[0]))

    expected = gradient(model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", world_size=1, rank=0)
    try:
        # Stock fairseq 0.12.2 has weights that are never trained.
        found = gradient(ModuleProxyWrapper(torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)))
    finally:
        torch.distributed.destroy_process_group()
    assert all(torch.allclose(found[name], expected[name], rtol=1e-12, atol=0) for name in expected)


def test_outside_the_models_forward_and_in_evaluation_nothing_differs():
    model, net_input = translation()
    expected = model(**net_input)[0]
    encoder_out = model.encoder(net_input["src_tokens"], src_lengths=net_input["src_lengths"])
    with scheduled_sampling(model, 0.0, Predictions()):
        assert torch.equal(model.decoder(net_input["prev_output_tokens"], encoder_out=encoder_out)[0], expected)
        assert torch.equal(model.eval()(**net_input)[0], expected)
        model.train()(**net_input)
        assert torch.equal(model.decoder(net_input["prev_output_tokens"], encoder_out=encoder_out)[0], expected)
    assert torch.equal(model.train()(**net_input)[0], expected)


def test_nothing_stays_behind_after_an_error():
    model, net_input = translation()
    expected = model(**net_input)[0]
    with pytest.raises(IndexError):
        with scheduled_sampling(model, 0.0, Predictions("topk-mix", 3)):
            model(**{**net_input, "prev_output_tokens": torch.full((3, 2), 99)})
    assert torch.equal(model(**net_input)[0], expected)
    assert "forward" not in vars(model.decoder) and not model._forward_pre_hooks


def adaptive():
    """A language model whose words stand in three clusters, and a batch."""
    dictionary = tiny_dictionary(words=3)
    args = Namespace(
        decoder_layers=1, decoder_embed_dim=8, decoder_ffn_embed_dim=16, decoder_attention_heads=2, dropout=0.0,
        tokens_per_sample=64, max_target_positions=64, adaptive_softmax_cutoff="4,6", adaptive_softmax_dropout=0.0,
    )
    base_lm_architecture(args)
    torch.manual_seed(0)
    task = Namespace(source_dictionary=dictionary, target_dictionary=dictionary)
    return TransformerLanguageModel.build_model(args, task).double().train(), language()[1]


@pytest.mark.parametrize("kind", ["argmax", "topk-mix"])
def test_adaptive_softmax(kind):
    model, net_input = adaptive()
    log_probs = model.get_normalized_probs(model(**net_input), log_probs=True)
    assert log_probs.size(-1) == len(model.decoder.dictionary)
    reads = tokens_read(model)
    with scheduled_sampling(model, 0.0, Predictions(kind, topk=2)), keep_teacher_forced():
        _, extra = model(**net_input)
    assert torch.allclose(extra["teacher_forced"].log_softmax(-1), log_probs)
    best = torch.stack([value.topk(2).indices for value in predicted(log_probs, net_input["src_tokens"]).values()])
    if kind == "topk-mix":
        assert torch.equal(reads[2], best)  # after the data's tokens in both passes
    else:
        assert torch.equal(reads[1][replaceable(net_input["src_tokens"], PAD)], best[:, 0])


class Counting(FairseqDecoder):
    """Its logits count the passes before, which it remembers for each row; its second output is a tensor."""

    def __init__(self):
        super().__init__(tiny_dictionary(words=3))
        self.passes = torch.tensor([10.0, 20.0, 30.0])

    def select_memory(self, rows):
        return self.passes[rows]

    def forward(self, prev_output_tokens, src_lengths=None, memory=None):
        before = self.passes if memory is None else memory
        if memory is None:
            self.passes = before + 1
        return before.view(-1, 1, 1).expand(*prev_output_tokens.shape, len(self.dictionary)), before


def test_the_first_pass_reads_a_memory_and_leaves_it_as_it_is():
    model, net_input = FairseqLanguageModel(Counting()).train(), language()[1]
    with scheduled_sampling(model, 0.5, Predictions()), keep_teacher_forced():
        logits, extra = model(**net_input)
    assert logits[:, 0, 0].tolist() == extra["teacher_forced"][:, 0, 0].tolist() == [10, 20, 30]
    assert model.decoder.passes.tolist() == [11, 21, 31]
    assert extra["attn"][0].tolist() == [10, 20, 30]


def recurrent():
    dictionary = tiny_dictionary(words=3)
    sizes = {"encoder_embed_dim": 4, "decoder_embed_dim": 4, "decoder_out_embed_dim": 4}
    args = Namespace(**sizes, encoder_layers=1, decoder_layers=1, dropout=0.0, criterion="cross_entropy")
    base_architecture(args)
    torch.manual_seed(0)
    model = LSTMModel.build_model(args, Namespace(source_dictionary=dictionary, target_dictionary=dictionary)).double().train()
    return model, {**translation()[1], **tiny_batch(model, lengths=(4, 3, 2))}


@pytest.mark.parametrize("kind", KINDS)
def test_recurrent_decoders_read_their_predictions_too(kind):
    model, net_input = recurrent()
    stock = model(**net_input)[0]
    with scheduled_sampling(model, 0.0, Predictions(kind, topk=3)):
        logits = model(**net_input)[0]
    assert torch.equal(logits[:, 0], stock[:, 0]) and not torch.allclose(logits[:2, 1], stock[:2, 1])


class Elsewhere(FairseqDecoder):
    """Embeds tokens without calling its `embed_tokens`."""

    def __init__(self):
        super().__init__(tiny_dictionary(words=3))
        self.embed_tokens = nn.Embedding(len(self.dictionary), 4)

    def forward(self, prev_output_tokens, src_lengths=None):
        return self.embed_tokens.weight[prev_output_tokens] @ self.embed_tokens.weight.T, {}


class ByName(FairseqLanguageModel):
    def forward(self, src_tokens, **unused):
        return self.decoder(prev_output_tokens=src_tokens)


@pytest.mark.parametrize("kind, model, message", [
    ("topk-mix", FairseqLanguageModel, "Elsewhere does not call its embed_tokens, so nothing was mixed; give argmax or sample"),
    ("argmax", ByName, "does not hand Elsewhere the tokens before each step as its first argument"),
])
def test_decoders_that_turn_out_to_be_unfit_are_named(kind, model, message):
    unfit = model(Elsewhere()).train()
    with pytest.raises(UsageError, match=message):
        with scheduled_sampling(unfit, 0.5, Predictions(kind)):
            unfit(**language()[1])


def test_models_that_cannot_be_fed_are_refused():
    model, _ = translation()
    check_decoder(model, Predictions("topk-mix"))
    check_decoder(recurrent()[0], Predictions("topk-mix"))
    with pytest.raises(UsageError, match="--scheduled-sampling: Linear has no decoder to feed; give a model that has one"):
        check_decoder(nn.Linear(1, 1), Predictions())
    del model.decoder.embed_tokens
    check_decoder(model, Predictions("sample"))
    with pytest.raises(UsageError, match="topk-mix: the decoder of TransformerModel has no embed_tokens .* give argmax or sample"):
        check_decoder(model, Predictions("topk-mix"))
