"""Continuations against the enumerated distribution of a tiny language model."""
from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from fairseq.models.lstm import LSTMDecoder

from fairseq_earm.errors import UsageError
from fairseq_earm.sampling.continuation import ContinuationSampler, score_continuations
from fairseq_earm.sampling.prefill import prefill
from tests.sampling.test_samplers import chi_square
from tests.tiny_language import TIED, enumerate_continuations, tiny_language_model

PREFIXES = torch.tensor([[4, 5, 4], [5, 5, 2]])
LENGTH = 2


def log_q_of(model, tokens, prefix_length):
    dictionary = model.decoder.dictionary
    return score_continuations(model, tokens, prefix_length, pad=dictionary.pad(), eos=dictionary.eos())


@pytest.mark.parametrize("settings", [{}, {"words": 3, **TIED}], ids=["one softmax", "adaptive"])
def test_distribution_and_log_q_are_those_of_the_enumeration(settings):
    model = tiny_language_model(**settings)
    sampler = ContinuationSampler(model.decoder.dictionary, LENGTH)
    samples = sampler(model, PREFIXES, 4000, generator=torch.Generator().manual_seed(3))
    for row, prefix in enumerate(PREFIXES):
        exact = enumerate_continuations(model, prefix, LENGTH)
        assert math.isclose(sum(map(math.exp, exact.values())), 1.0, abs_tol=1e-9)
        mine = samples.sources == row
        drawn = [tuple(tokens) for tokens in samples.tokens[mine].tolist()]
        for sequence, log_q in list(zip(drawn, samples.log_q[mine].sum(1).tolist()))[:200]:
            assert log_q == pytest.approx(exact[sequence], abs=1e-6)
        statistic, freedom = chi_square(Counter(drawn), {x: math.exp(p) for x, p in exact.items()}, len(drawn))
        assert statistic < freedom + 5 * math.sqrt(2 * freedom), (statistic, freedom)
        sequences = torch.tensor([[*prefix.tolist(), *x] for x in exact])
        assert torch.allclose(log_q_of(model, sequences, 3).sum(1), torch.tensor(list(exact.values())).double())


def test_truncated_proposals_are_renormalised():
    model = tiny_language_model()
    sampler = ContinuationSampler(model.decoder.dictionary, 1, topk=2, temperature=1.5)
    samples = sampler(model, PREFIXES[:1], 500)
    exact = {x: p / 1.5 for x, p in enumerate_continuations(model, PREFIXES[0], 1).items()}
    best = sorted(exact, key=exact.get)[-2:]
    total = math.log(sum(math.exp(exact[x]) for x in best))
    assert {tuple(x) for x in samples.tokens.tolist()} == set(best)
    for tokens, log_q in zip(samples.tokens.tolist(), samples.log_q.sum(1).tolist()):
        assert log_q == pytest.approx(exact[tuple(tokens)] - total, abs=1e-6)


def test_random_numbers_come_from_the_generator_alone():
    model = tiny_language_model()
    sampler = ContinuationSampler(model.decoder.dictionary, 5)
    before = torch.get_rng_state()
    draws = [sampler(model, PREFIXES, 3, generator=torch.Generator().manual_seed(seed)).tokens for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("proposal", [{}, {"topk": 2}, {"topp": 0.5}], ids=str)
def test_a_model_whose_probabilities_are_no_numbers_draws_nothing(proposal):
    model = tiny_language_model()
    model.decoder.layers[0].fc1.weight.data.fill_(float("nan"))
    sampler = ContinuationSampler(model.decoder.dictionary, LENGTH, **proposal)
    with pytest.raises(UsageError, match="probabilities are no numbers"):
        sampler(model, PREFIXES, 2)


def test_an_empty_prefix_is_the_beginning_of_a_text():
    model = tiny_language_model()
    samples = ContinuationSampler(model.decoder.dictionary, LENGTH)(model, PREFIXES[:1, :0], 4)
    exact = enumerate_continuations(model, PREFIXES[0, :0], LENGTH)
    for tokens, log_q in zip(samples.tokens.tolist(), samples.log_q.sum(1).tolist()):
        assert log_q == pytest.approx(exact[tuple(tokens)], abs=1e-6)


@pytest.mark.parametrize("settings", [{}, {"decoder_normalize_before": True}, {"decoder_learned_pos": True}])
def test_a_cache_filled_in_one_pass_is_the_cache_filled_token_by_token(settings):
    decoder = tiny_language_model(**settings).decoder
    read, at_once, stepwise = torch.cat([PREFIXES.new_full((2, 1), 2), PREFIXES], 1), {}, {}
    with torch.no_grad():
        prefill(decoder, read, at_once)
        for end in range(1, 5):
            decoder(read[:, :end], incremental_state=stepwise)
        assert at_once.keys() == stepwise.keys()
        for name in stepwise:
            for key in ("prev_key", "prev_value"):
                assert torch.allclose(at_once[name][key], stepwise[name][key], atol=1e-6)
        longer = torch.cat([read, PREFIXES[:, :1]], 1)
        full = decoder(longer)[0][:, -1]
        assert torch.allclose(decoder(longer, incremental_state=at_once)[0][:, -1], full, atol=1e-6)


def test_other_decoders_read_the_prefix_token_by_token():
    dictionary = tiny_language_model().decoder.dictionary
    torch.manual_seed(1)
    decoder = LSTMDecoder(
        dictionary, embed_dim=4, hidden_size=4, out_embed_dim=4, num_layers=1, attention=False, encoder_output_units=0
    ).double().eval()
    cache, full = {}, decoder(PREFIXES)[0][:, -1]
    prefill(decoder, PREFIXES[:, :-1], cache)
    assert torch.allclose(decoder(PREFIXES, incremental_state=cache)[0][:, -1], full)
