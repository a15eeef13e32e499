"""Draws from a joint model against its enumerated distribution on a tiny language."""
import logging
import math
from collections import Counter

import pytest
import torch

from fairseq_earm.joint_generation import Candidates, JointGenerator, chunk_of, draw_candidates
from fairseq_earm.sampling.continuation import ContinuationSampler
from tests.sampling.test_samplers import chi_square
from tests.tiny_language import enumerate_continuations, tiny_language_model

PREFIX = torch.tensor([4, 5, 4])
LENGTH = 2


class Energy(torch.nn.Module):
    """An energy that depends on prefix and continuation, and on the order of both."""

    def __init__(self, scale=1.0, positions=100):
        super().__init__()
        self.scale = scale
        self.positions = positions
        self.seen = []

    def forward(self, tokens):
        self.seen.append(tokens.size(0))
        places = torch.arange(1, tokens.size(1) + 1)
        return self.scale * (tokens * places).double().sin().sum(1)

    def max_positions(self):
        return self.positions


def batch(prefixes):
    return {"net_input": {"src_tokens": prefixes}}, prefixes


@pytest.fixture(scope="module")
def base():
    return tiny_language_model()


def generate(generator, base, prefixes):
    sample, prefixes = batch(prefixes)
    return generator.generate([base], sample, prefix_tokens=prefixes)


def joint_distribution(base, prefix, energy):
    """Continuation → its probability under P_LM · exp(−E) / Z."""
    exact = enumerate_continuations(base, prefix, LENGTH)
    sequences = torch.tensor([[*prefix.tolist(), *x] for x in exact])
    log_joint = torch.tensor(list(exact.values())).double() - energy(sequences)
    return dict(zip(exact, log_joint.softmax(0).tolist()))


def test_with_many_candidates_draws_have_the_joint_distribution(base):
    torch.manual_seed(1)
    draws, energy = 1500, Energy(1.5)
    generator = JointGenerator(base, LENGTH, energy=energy, candidates=400, chunk=20000)
    drawn = [tuple(row[0]["tokens"].tolist()) for row in generate(generator, base, PREFIX.repeat(draws, 1))]
    joint = joint_distribution(base, PREFIX, energy)
    statistic, freedom = chi_square(Counter(drawn), joint, draws)
    assert statistic < freedom + 5 * math.sqrt(2 * freedom), (statistic, freedom)
    plain = {x: math.exp(p) for x, p in enumerate_continuations(base, PREFIX, LENGTH).items()}
    statistic, freedom = chi_square(Counter(drawn), plain, draws)
    assert statistic > freedom + 50 * math.sqrt(2 * freedom), "the energy matters"


def test_without_an_energy_draws_have_the_base_distribution(base):
    torch.manual_seed(1)
    generator = JointGenerator(base, LENGTH, nbest=2, chunk=20000)
    rows = generate(generator, base, PREFIX.repeat(2000, 1))
    assert {len(row) for row in rows} == {2}
    drawn = [tuple(hypothesis["tokens"].tolist()) for row in rows for hypothesis in row]
    plain = {x: math.exp(p) for x, p in enumerate_continuations(base, PREFIX, LENGTH).items()}
    statistic, freedom = chi_square(Counter(drawn), plain, len(drawn))
    assert statistic < freedom + 5 * math.sqrt(2 * freedom), (statistic, freedom)


def test_among_given_candidates_the_choice_is_proportional_to_exp_of_minus_energy(base):
    torch.manual_seed(2)
    draws = 20000
    neg_energies = torch.tensor([0.0, 1.0, -2.0, 1.0], dtype=torch.float64)
    tokens = torch.arange(4).view(1, 4, 1).expand(draws, 4, LENGTH)
    candidates = Candidates(tokens, torch.zeros(draws, 4, LENGTH), neg_energies.expand(draws, 4))
    generator = JointGenerator(base, LENGTH, energy=Energy(), candidates=4, nbest=2)
    generator._random = torch.Generator().manual_seed(3)
    pairs = Counter(tuple(int(h["tokens"][0]) for h in row) for row in generator._choose(candidates))
    weights = neg_energies.softmax(0).tolist()
    # Two draws without replacement.
    exact = {(i, j): weights[i] * weights[j] / (1 - weights[i]) for i in range(4) for j in range(4) if i != j}
    assert sum(exact.values()) == pytest.approx(1)
    statistic, freedom = chi_square(pairs, exact, draws)
    assert statistic < freedom + 5 * math.sqrt(2 * freedom), (statistic, freedom)


def test_hypotheses_and_their_scores(base):
    torch.manual_seed(1)
    energy = Energy()
    generator = JointGenerator(base, LENGTH, energy=energy, candidates=200, nbest=200, select="best", lenpen=0.5)
    hypotheses = generate(generator, base, PREFIX.unsqueeze(0))[0]
    exact, scores = enumerate_continuations(base, PREFIX, LENGTH), []
    for hypothesis in hypotheses:
        tokens = tuple(hypothesis["tokens"].tolist())
        log_q = hypothesis["positional_scores"].sum().item()
        assert log_q == pytest.approx(exact[tokens], abs=1e-6)
        neg_energy = -energy(torch.tensor([[*PREFIX.tolist(), *tokens]])).item()
        scores.append((log_q + neg_energy) / LENGTH**0.5)
        assert hypothesis["score"].item() == pytest.approx(scores[-1], abs=1e-6)
        assert hypothesis["attention"].numel() == hypothesis["alignment"].numel() == 0
    assert scores == sorted(scores, reverse=True) and len(set(scores)) > 5
    joint = joint_distribution(base, PREFIX, energy)
    assert tuple(hypotheses[0]["tokens"].tolist()) == max(joint, key=joint.get)


def test_chunks_bound_every_pass_and_lose_no_candidate(base):
    energy = Energy()
    sampler = ContinuationSampler(base.decoder.dictionary, LENGTH)
    prefixes = torch.tensor([[4, 5], [5, 5], [2, 4]])
    for count, chunk, passes in ((7, 3, [3, 3, 1] * 3), (2, 5, [4, 2]), (4, 4, [4, 4, 4]), (3, 1, [1] * 9)):
        energy.seen.clear()
        found = draw_candidates(base, energy, sampler, prefixes, count, chunk=chunk)
        assert energy.seen == passes
        assert found.tokens.shape == found.log_q.shape == (3, count, LENGTH)
        sequences = torch.cat([prefixes.repeat_interleave(count, 0), found.tokens.view(-1, LENGTH)], 1)
        assert torch.allclose(-energy(sequences).view(3, count), found.neg_energies)
        for row in range(3):
            exact = enumerate_continuations(base, prefixes[row], LENGTH)
            for tokens, log_q in zip(found.tokens[row].tolist(), found.log_q[row].sum(1).tolist()):
                assert log_q == pytest.approx(exact[tuple(tokens)], abs=1e-6)


def test_prefixes_of_several_lengths_in_one_batch(base):
    torch.manual_seed(1)
    pad = base.decoder.dictionary.pad()
    prefixes = [torch.tensor([4, 5, 4]), torch.tensor([], dtype=torch.long), torch.tensor([5]), torch.tensor([5, 5, 4])]
    padded = torch.nn.utils.rnn.pad_sequence(prefixes, batch_first=True, padding_value=pad)
    generator = JointGenerator(base, LENGTH, energy=Energy(), candidates=20)
    for prefix, (hypothesis,) in zip(prefixes, generate(generator, base, padded)):
        exact = enumerate_continuations(base, prefix, LENGTH)
        assert hypothesis["positional_scores"].sum().item() == pytest.approx(exact[tuple(hypothesis["tokens"].tolist())], abs=1e-6)


def test_draws_follow_the_seed_and_leave_the_global_stream_alone(base):
    def draw(seed):
        torch.manual_seed(seed)
        generator = JointGenerator(base, 6, energy=Energy(), candidates=20)
        before = torch.get_rng_state()
        tokens = [row[0]["tokens"].tolist() for row in generate(generator, base, PREFIX.repeat(20, 1))]
        assert torch.equal(before, torch.get_rng_state())
        return tokens

    assert draw(1) == draw(1) != draw(2)


def test_effective_sample_sizes_are_reported_and_low_ones_warned_about_once(base, caplog):
    caplog.set_level(logging.INFO)
    generator = JointGenerator(base, LENGTH, energy=Energy(0.0), candidates=50)
    for prefixes in (3, 2):
        generate(generator, base, PREFIX.repeat(prefixes, 1))
    message = "effective sample size of 50 candidates: mean 50.0, least 50.0, over %d prefixes so far"
    assert [record.getMessage() for record in caplog.records] == [message % 3, message % 5]
    caplog.clear()
    generator = JointGenerator(base, LENGTH, energy=Energy(50.0), candidates=50)
    for _ in range(2):
        generate(generator, base, PREFIX.repeat(2, 1))
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and "of 50 candidates, below 10" in warnings[0] and "--energy-candidates" in warnings[0]


def test_no_report_without_an_energy(base, caplog):
    caplog.set_level(logging.INFO)
    generate(JointGenerator(base, LENGTH), base, PREFIX.unsqueeze(0))
    assert not caplog.records


def test_bad_settings_are_named(base):
    with pytest.raises(SystemExit, match="--energy-candidates 1 leaves nothing to choose 1 from: give 2 or more"):
        JointGenerator(base, LENGTH, energy=Energy(), candidates=1)
    with pytest.raises(SystemExit, match="--energy-candidates 3 leaves nothing to choose 4 from: give 4"):
        JointGenerator(base, LENGTH, energy=Energy(), candidates=3, nbest=4)
    generator = JointGenerator(base, LENGTH, energy=Energy(positions=4), candidates=4)
    assert generator.room == 2 and JointGenerator(base, LENGTH).room == 62
    with pytest.raises(SystemExit, match="a prefix of 3 tokens leaves no room for 2 more"):
        generate(generator, base, PREFIX.unsqueeze(0))
    generate(generator, base, PREFIX[:2].unsqueeze(0))


def test_energies_that_are_not_finite_end_it(base):
    for value in (math.nan, math.inf):
        generator = JointGenerator(base, LENGTH, energy=Energy(value), candidates=4)
        with pytest.raises(SystemExit, match="4 of 4 energies are not finite"):
            generate(generator, base, PREFIX.unsqueeze(0))


def test_chunk_of():
    assert [chunk_of(100, 1000), chunk_of(100, 99), chunk_of(120)] == [10, 1, 100]
