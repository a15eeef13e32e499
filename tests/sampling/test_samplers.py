"""Both samplers against the enumerated distribution of a tiny model."""
from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from fairseq_earm.sampling.ancestral import AncestralSampler, max_lengths
from fairseq_earm.sampling.decoding import StockSteps
from fairseq_earm.sampling.draw import BLOCK, draw
from fairseq_earm.sampling.isolation import isolated
from fairseq_earm.sampling.scoring import decoder_input
from fairseq_earm.sampling.search import GeneratorSampler, truncate_log_probs
from fairseq_earm.sampling.transformer_steps import TransformerSteps
from tests.tiny_language import ADAPTIVE
from tests.tiny_model import enumerate_targets, tiny_batch, tiny_model

LENGTH = 3
DRAWS = 4000


def sequences(samples):
    """Drawn token tuples, row by row."""
    return [tuple(row[inside].tolist()) for row, inside in zip(samples.tokens, samples.mask)]


def samplers(dictionary):
    fixed = {"max_len_a": 0.0, "max_len_b": LENGTH}
    return {
        "ancestral": (AncestralSampler(dictionary, **fixed), None),
        "generator": (GeneratorSampler(dictionary, **fixed), None),
        "temperature": (
            GeneratorSampler(dictionary, temperature=1.7, **fixed), lambda log_probs: (log_probs / 1.7).log_softmax(-1)
        ),
        "topk": (GeneratorSampler(dictionary, topk=3, **fixed), lambda log_probs: truncate_log_probs(log_probs, topk=3)),
        "topp": (GeneratorSampler(dictionary, topp=0.995, **fixed), lambda log_probs: truncate_log_probs(log_probs, topp=0.995)),
    }


def chi_square(counts, probabilities, draws):
    """Pearson's statistic and its degrees of freedom, with rare outcomes pooled."""
    common = [x for x, p in probabilities.items() if p * draws >= 5]
    rest = 1 - sum(probabilities[x] for x in common)
    statistic = sum((counts[x] - draws * probabilities[x]) ** 2 / (draws * probabilities[x]) for x in common)
    others = draws - sum(counts[x] for x in common)
    statistic += (others - draws * rest) ** 2 / max(draws * rest, 1e-9) if rest * draws >= 5 else 0.0
    return statistic, len(common) - 1 + (rest * draws >= 5)


@pytest.mark.parametrize("head", [{}, ADAPTIVE], ids=["one softmax", "adaptive"])
@pytest.mark.parametrize("name", ["ancestral", "generator", "temperature", "topk", "topp"])
def test_distribution_and_log_q_are_those_of_the_enumeration(name, head):
    model = tiny_model(words=3 if head else 2, **head)
    net_input = tiny_batch(model)
    sampler, transform = samplers(model.decoder.dictionary)[name]
    torch.manual_seed(7)
    samples = sampler(model, net_input, negatives=DRAWS)
    drawn = sequences(samples)
    if head and name == "temperature":  # fairseq's generator puts it on the features that an adaptive softmax reads
        transform = None
        model.decoder.register_forward_hook(lambda module, inputs, output: (output[0] / 1.7, *output[1:]))
    for source in range(2):
        exact = enumerate_targets(model, net_input, source, LENGTH, transform)
        assert math.isclose(sum(map(math.exp, exact.values())), 1.0, abs_tol=1e-9)
        rows = (samples.sources == source).nonzero().flatten().tolist()
        for row in rows[:300]:
            assert samples.log_q[row].sum().item() == pytest.approx(exact[drawn[row]], abs=1e-4)
        counts = Counter(drawn[row] for row in rows)
        assert all(exact[sequence] > -math.inf for sequence in counts)
        statistic, freedom = chi_square(counts, {x: math.exp(p) for x, p in exact.items()}, len(rows))
        # Five standard deviations of a chi-square distribution.
        assert statistic < freedom + 5 * math.sqrt(2 * freedom), (statistic, freedom)


def test_a_sampler_that_draws_too_few_of_one_token_would_be_noticed():
    """The check above can fail: the same statistic rejects a distribution that is off by a temperature of 1.1."""
    model = tiny_model()
    net_input = tiny_batch(model)
    sampler = GeneratorSampler(model.decoder.dictionary, max_len_a=0.0, max_len_b=LENGTH, temperature=1.1)
    torch.manual_seed(7)
    samples = sampler(model, net_input, negatives=DRAWS)
    exact = {x: math.exp(p) for x, p in enumerate_targets(model, net_input, 0, LENGTH).items()}
    statistic, freedom = chi_square(Counter(sequences(samples)[:DRAWS]), exact, DRAWS)
    assert statistic > freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("name", ["ancestral", "generator"])
def test_truncation_is_marked_and_no_end_is_forced(name):
    model = tiny_model()
    eos = model.decoder.dictionary.eos()
    sampler, _ = samplers(model.decoder.dictionary)[name]
    samples = sampler(model, tiny_batch(model), negatives=200)
    ends = [sequence[-1] == eos for sequence in sequences(samples)]
    assert samples.truncated.tolist() == [not end for end in ends]
    assert 0 < sum(ends) < len(ends)
    assert all(len(sequence) == LENGTH for sequence, end in zip(sequences(samples), ends) if not end)
    assert samples.lengths.tolist() == [len(sequence) for sequence in sequences(samples)]
    assert samples.tokens[~samples.mask].eq(model.decoder.dictionary.pad()).all()
    assert samples.log_q[~samples.mask].eq(0).all()


@pytest.mark.parametrize("name", ["ancestral", "generator"])
def test_limits_follow_each_source(name):
    model = tiny_model()
    kind = {"ancestral": AncestralSampler, "generator": GeneratorSampler}[name]
    sampler = kind(model.decoder.dictionary, max_len_a=2.0, max_len_b=0)
    samples = sampler(model, tiny_batch(model, lengths=(3, 1)), negatives=100)
    longest = [samples.lengths[samples.sources == source].max().item() for source in (0, 1)]
    assert longest == [6, 2]


@pytest.mark.parametrize("name", ["ancestral", "generator"])
def test_nothing_is_left_behind(name):
    model = tiny_model(dropout=0.3).train()
    model.encoder.layers[0].eval()
    model.decoder.set_beam_size(5)
    modes = [module.training for module in model.modules()]
    sampler, _ = samplers(model.decoder.dictionary)[name]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    # Nearly all draws of this model are the same sequence; among a hundred some differ.
    first = sampler(model, tiny_batch(model), negatives=100)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes
    assert model.decoder._beam_size == 5
    assert not first.log_q.requires_grad
    again = sampler(model, tiny_batch(model), negatives=100)
    assert torch.equal(first.tokens, again.tokens) and torch.equal(first.log_q, again.log_q)
    torch.manual_seed(4)
    assert not torch.equal(first.tokens, sampler(model, tiny_batch(model), negatives=100).tokens)


@pytest.mark.parametrize("name", ["ancestral", "generator"])
def test_prefix_tokens_are_kept_and_not_charged(name):
    model = tiny_model()
    word = model.decoder.dictionary.nspecial
    prefix = torch.tensor([[word], [word + 1]])
    sampler, _ = samplers(model.decoder.dictionary)[name]
    samples = sampler(model, tiny_batch(model), negatives=50, prefix_tokens=prefix)
    assert samples.tokens[:, 0].tolist() == prefix.flatten().repeat_interleave(50).tolist()
    assert not samples.mask[:, 0].any() and samples.log_q[:, 0].eq(0).all()
    exact = enumerate_targets(model, tiny_batch(model), 0, LENGTH)
    total = sum(math.exp(p) for x, p in exact.items() if x[0] == word)
    row = 0
    full = tuple(samples.tokens[row][: samples.lengths[row] + 1].tolist())
    assert samples.log_q[row].sum().item() == pytest.approx(exact[full] - math.log(total), abs=1e-4)


@pytest.mark.parametrize("cache", [True, False], ids=["fairseq's cache", "no cache"])
def test_every_way_of_decoding_draws_the_same(monkeypatch, caplog, cache):
    model = tiny_model(decoder_normalize_before=True)
    sampler, _ = samplers(model.decoder.dictionary)["ancestral"]
    torch.manual_seed(5)
    quick = sampler(model, tiny_batch(model), negatives=40)
    monkeypatch.setattr(TransformerSteps, "knows", staticmethod(lambda decoder: False))
    monkeypatch.setattr(StockSteps, "dead_share", TransformerSteps.dead_share)  # random numbers go by row
    if not cache:
        monkeypatch.setattr("fairseq_earm.sampling.decoding.FairseqIncrementalDecoder", torch.nn.Embedding)
    plain = sampler(model, tiny_batch(model), negatives=40)
    assert torch.equal(quick.tokens, plain.tokens) and torch.equal(quick.truncated, plain.truncated)
    assert len({*sequences(quick)}) > 3
    assert torch.allclose(quick.log_q, plain.log_q, atol=1e-6)
    assert ("no incremental decoding" in caplog.text) is not cache


@pytest.mark.parametrize("every", [2, 3, 100])
def test_rows_that_have_finished_without_being_looked_at_change_nothing(monkeypatch, every):
    """What a GPU does, where finished rows stay in the batch for some steps: distribution and marks stay exact."""
    monkeypatch.setattr("fairseq_earm.sampling.ancestral.LOOK_EVERY", {"cpu": every})
    test_distribution_and_log_q_are_those_of_the_enumeration("ancestral", {})
    test_truncation_is_marked_and_no_end_is_forced("ancestral")
    test_limits_follow_each_source("ancestral")
    test_prefix_tokens_are_kept_and_not_charged("ancestral")


def test_start_token_of_the_batch_is_used():
    model = tiny_model()
    net_input = tiny_batch(model)
    word = model.decoder.dictionary.nspecial
    started = {**net_input, "prev_output_tokens": torch.full((2, 2), word)}
    for name in ("ancestral", "generator"):
        sampler, _ = samplers(model.decoder.dictionary)[name]
        torch.manual_seed(0)
        assert not torch.equal(
            sampler(model, net_input, negatives=500).log_q.sum(), sampler(model, started, negatives=500).log_q.sum()
        )


@pytest.mark.parametrize("name", ["ancestral", "generator"])
def test_what_is_cut_keeps_its_last_token_while_others_go_on(name):
    """log q, which was noted token by token, is that of the tokens returned, also of rows cut before the batch ends."""
    model = tiny_model()
    net_input = tiny_batch(model, lengths=tuple(range(2, 12)))
    kind = {"ancestral": AncestralSampler, "generator": GeneratorSampler}[name]
    samples = kind(model.decoder.dictionary, max_len_a=0.4, max_len_b=1)(model, net_input, negatives=30)
    assert samples.truncated.sum() > 50 and samples.lengths[samples.truncated].unique().numel() > 3
    ends = samples.tokens.gather(1, samples.lengths.unsqueeze(1) - 1).squeeze(1)
    assert torch.equal(ends.ne(model.decoder.dictionary.eos()), samples.truncated)
    with torch.no_grad():
        encoder_out = model.encoder.reorder_encoder_out(model.encoder(**net_input), samples.sources)
        previous = decoder_input(samples.tokens, model.decoder.dictionary.eos())
        logits = model.decoder(previous, encoder_out=encoder_out)[0]
    logits[:, :, model.decoder.dictionary.pad()] = -math.inf
    expected = logits.log_softmax(-1).gather(-1, samples.tokens.unsqueeze(-1)).squeeze(-1).masked_fill(~samples.mask, 0.0)
    assert torch.allclose(samples.log_q.double(), expected, atol=1e-5)


def test_batches_of_one_update_draw_apart_without_dropout():
    model = tiny_model()
    sampler, _ = samplers(model.decoder.dictionary)["ancestral"]
    one, other = tiny_batch(model), tiny_batch(model, seed=2)
    torch.manual_seed(0)
    first, second = sampler(model, one, negatives=50), sampler(model, other, negatives=50)
    with isolated(model, one["src_tokens"]):
        uniform = torch.rand(5)
    with isolated(model, other["src_tokens"]):
        assert not torch.equal(uniform, torch.rand(5))
    assert first.tokens.shape != second.tokens.shape or not torch.equal(first.tokens, second.tokens)


def test_draw_skips_impossible_tokens_and_survives_nan():
    logits = torch.full((1000, 4), -math.inf)
    logits[:, 1] = 0.0
    logits[:, 2] = 0.0
    tokens, log_probs = draw(logits)
    assert set(tokens.tolist()) == {1, 2}
    assert torch.allclose(log_probs, torch.full((1000,), math.log(0.5)))
    tokens, log_probs = draw(torch.full((3, 4), math.nan))
    assert tokens.ge(0).all() and tokens.lt(4).all() and log_probs.isnan().all()


@pytest.mark.parametrize("words", [3, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK + 5])
def test_draw_inverts_the_cumulative_distribution(words, monkeypatch):
    """At points between all tokens' running sums: one token each, and never one that has no probability."""
    torch.manual_seed(2)
    logits = (3 * torch.randn(words, dtype=torch.float64)).index_fill(0, torch.arange(0, words, 3), -math.inf)
    probabilities = logits.softmax(-1)
    possible = probabilities.nonzero().flatten()
    middles = (probabilities.cumsum(0) - probabilities / 2)[possible]
    monkeypatch.setattr(torch, "rand", lambda shape, **_: middles.unsqueeze(1))
    tokens, log_probs = draw(logits.expand(possible.numel(), -1))
    assert tokens.tolist() == possible.tolist()
    assert torch.allclose(log_probs, logits.log_softmax(-1)[possible])
    for edge, token in ((0.0, possible[0]), (1.0, possible[-1])):
        monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.full(shape, edge, dtype=torch.float64))
        assert draw(logits.unsqueeze(0))[0] == token


def test_lengths_stay_within_the_decoder():
    model = tiny_model(max_target_positions=8)
    limits = max_lengths(torch.tensor([1, 5, 100]), 1.5, 0, model.decoder)
    assert limits.tolist() == [1, 7, 7]
    assert max_lengths(torch.tensor([3]), 1e30, 0, model.decoder).tolist() == [7]
    assert max_lengths(torch.tensor([3]), 0, 10**20, model.decoder).tolist() == [7]


def test_truncation_keeps_the_smallest_set_that_reaches_p():
    log_probs = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert truncate_log_probs(log_probs, topp=0.5).exp().tolist() == pytest.approx([1.0, 0, 0, 0])
    assert truncate_log_probs(log_probs, topp=0.6).exp().tolist() == pytest.approx([0.625, 0.375, 0, 0])
    assert truncate_log_probs(log_probs, topk=3).exp().sum().item() == pytest.approx(1.0)
    assert torch.allclose(truncate_log_probs(log_probs), log_probs)


def test_probability_left_out_counts_for_no_token():
    """Padding is out without renormalisation when fairseq cuts at p: 0.5 and 0.2 do not reach 0.75."""
    log_probs = torch.tensor([0.5, 0.2, 0.1, 0.0]).log()
    assert truncate_log_probs(log_probs, topp=0.75).exp().tolist() == pytest.approx([0.625, 0.25, 0.125, 0])
    assert truncate_log_probs(log_probs, topp=0.9).exp().tolist() == pytest.approx([0.625, 0.25, 0.125, 0])
    assert truncate_log_probs(log_probs).exp().tolist() == pytest.approx([0.625, 0.25, 0.125, 0])
