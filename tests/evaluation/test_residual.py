"""Measurements of joint models against tiny languages whose every sequence is listed."""
from __future__ import annotations

import itertools
import math
import statistics

import pytest
import torch

from fairseq_earm.ebm.partition import log_partition
from fairseq_earm.errors import UsageError
from fairseq_earm.evaluation.joint_models import LanguageJoint
from fairseq_earm.evaluation.residual import measure_sequence, perplexity, summarize
from tests.oracles.residual import ListedJoint
from tests.tiny_language import enumerate_continuations, tiny_language_model

PREFIX, CONTINUATION = (4, 5, 4), (5, 2, 4)
ITEM = torch.tensor(PREFIX + CONTINUATION)
PAD, EOS, VOCABULARY = 1, 2, 6


class Table:
    """An energy for every sequence, strong enough to move the normaliser, and how many sequences it was asked about at once."""

    def __init__(self, scale: float = 2.0, poison=None):
        generator = torch.Generator().manual_seed(5)
        self.values = scale * torch.randn(VOCABULARY**3, generator=generator, dtype=torch.float64)
        self.poison = poison
        self.calls = []

    def __call__(self, tokens):
        assert tuple(tokens[0, :3].tolist()) == PREFIX and (tokens != PAD).all()
        self.calls.append(tokens.size(0))
        energies = self.values[(tokens[:, 3:] * torch.tensor([VOCABULARY**2, VOCABULARY, 1])).sum(1)]
        if self.poison is not None:
            energies = energies.clone()
            energies[(tokens[:, 3:] == torch.tensor(self.poison)).all(1)] = float("nan")
        return energies


@pytest.fixture(scope="module")
def base():
    return tiny_language_model(seed=3)  # it gives padding much probability, which must not count


@pytest.fixture(scope="module")
def exact(base):
    log_probs = enumerate_continuations(base, torch.tensor(PREFIX), 3)
    energies = Table()(torch.tensor([PREFIX + x for x in log_probs])).tolist()
    return ListedJoint(log_probs, dict(zip(log_probs, energies)))


def joint(base, chunk=1000, **table):
    return LanguageJoint(base, Table(**table), len(PREFIX), chunk=chunk)


def measure(model, seed=1, **settings):
    return measure_sequence(model, ITEM, index=0, seed=seed, **settings)


def test_base_log_probs_are_the_enumerated_ones_and_fairseq_s_own_but_for_padding(base, exact):
    record = measure(LanguageJoint(base, None, len(PREFIX), chunk=1))
    assert record.keys() == {"index", "base"}
    assert math.fsum(record["base"]) == pytest.approx(exact.log_probs[CONTINUATION], abs=1e-6)
    log_probs = base.get_normalized_probs(base(torch.tensor([[EOS, *PREFIX, *CONTINUATION[:-1]]])), log_probs=True)[0, 3:]
    for mine, theirs, token in zip(record["base"], log_probs, CONTINUATION):
        assert mine == pytest.approx((theirs[token] - torch.log1p(-theirs[PAD].exp())).item(), abs=1e-5)


def test_estimates_of_the_joint_log_probability_bracket_the_exact_one_in_expectation(base, exact):
    model, bounds = joint(base), []
    for seed in range(600):
        record = measure(model, seed, samples=[4])
        assert record["energy"] == exact.energies[CONTINUATION]
        bounds.append(record["log_z"][0])
    for values, sign in zip(zip(*bounds), (1, -1)):
        mean, error = statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))
        assert sign * (exact.log_z() - mean) > 2 * error, "the estimate should be off by more than chance, to this side"


def test_estimates_converge_to_the_exact_log_z(base, exact):
    lower, upper = measure(joint(base), samples=[40_000])["log_z"][0]
    assert lower == pytest.approx(exact.log_z(), abs=0.04) and upper == pytest.approx(exact.log_z(), abs=0.04)


def test_steps_converge_to_the_exact_ones_and_the_last_is_exact(base, exact):
    record = measure(joint(base, chunk=2000), samples=[20_000], per_step=True)
    for step, (lower, upper) in enumerate(record["steps"], start=1):
        assert lower <= upper
        wanted = exact.step_log_prob(CONTINUATION, step)
        assert lower == pytest.approx(wanted, abs=0.08) and upper == pytest.approx(wanted, abs=0.08)
    assert record["steps"][-1] == pytest.approx([exact.step_log_prob(CONTINUATION, 3)] * 2, abs=1e-6)


def test_the_steps_of_one_run_add_up_to_its_joint_log_probability(base):
    """What is between the ends cancels: Σ_t (lower_t + upper_t) holds every estimate once with each sign."""
    record = measure(joint(base), samples=[16], per_step=True)
    both_ends = 2 * (math.fsum(record["base"]) - record["energy"]) - sum(record["log_z"][0])
    assert math.fsum(itertools.chain(*record["steps"])) == pytest.approx(both_ends, abs=1e-9)


def test_a_continuation_of_one_token_has_exact_steps(base):
    model = LanguageJoint(base, lambda tokens: tokens[:, -1].double().sin(), len(ITEM) - 1, chunk=2)
    lower, upper = measure(model, samples=[4], per_step=True)["steps"][0]
    log_probs = enumerate_continuations(base, ITEM[:-1], 1)
    total = math.fsum(math.exp(log_prob - math.sin(x[0])) for x, log_prob in log_probs.items())
    wanted = log_probs[(4,)] - math.sin(4) - math.log(total)
    assert lower == upper == pytest.approx(wanted, abs=1e-6)


def test_one_set_of_samples_serves_every_number_of_them(base, exact):
    model = joint(base, chunk=10)
    record = measure(model, samples=[4, 25])
    assert model.energies.calls == [1, 10, 10, 5]
    drawn = model.sampled_energies(ITEM, 0, 25, seed=7)
    assert set(drawn.tolist()) <= set(exact.energies.values())
    with_steps = measure(model, samples=[4, 25], per_step=True)
    assert {key: with_steps[key] for key in record} == record, "the steps do not touch the samples of log Z"
    assert record != measure(model, seed=2, samples=[4, 25]) != measure(model, seed=1, samples=[4, 25])
    assert record["log_z"] != measure_sequence(model, ITEM, index=1, samples=[4, 25])["log_z"]


def test_the_curve_takes_the_first_samples(base):
    class Recorded(LanguageJoint):
        def sampled_energies(self, *arguments):
            self.drawn = super().sampled_energies(*arguments)
            return self.drawn

    model = Recorded(base, Table(), len(PREFIX), chunk=7)
    for (lower, upper), n in zip(measure(model, samples=[4, 25])["log_z"], (4, 25)):
        assert (lower, upper) == tuple(value.item() for value in log_partition(-model.drawn[:n]))


@pytest.mark.parametrize("which", ["the sequence itself", "a sample", "another last token"])
def test_an_energy_that_is_not_a_number_names_its_sequence(base, exact, which):
    likeliest = max(exact.log_probs, key=exact.log_probs.get)
    poison = {"the sequence itself": CONTINUATION, "a sample": likeliest, "another last token": (5, 2, 5)}[which]
    with pytest.raises(UsageError, match="sequence 17: its energy.* is nan"):
        measure_sequence(joint(base, poison=poison), ITEM, index=17, samples=[100], per_step=True)


def record(index, base, energy, log_z, steps):
    return {"index": index, "base": base, "energy": energy, "log_z": log_z, "steps": steps}


def test_corpus_figures_from_numbers_worked_out_by_hand():
    one = record(0, [-1.0, -2.0], 0.5, [[0.0, 0.4], [0.1, 0.2]], [[-1.5, -0.5], [-2.0, -2.0]])
    two = record(1, [-3.0, -1.0], -1.5, [[0.0, 0.0], [0.3, 0.5]], [[-2.5, -1.5], [-1.0, -1.0]])
    summary = summarize([one, two], [10, 100], per_step=True)
    assert (summary["sequences"], summary["tokens"]) == (2, 4)
    assert summary["base"] == {"nll": 1.75, "perplexity": pytest.approx(math.exp(1.75))}
    first, second = summary["joint"]
    # −log P: 3 + 0.5 + log Z and 4 − 1.5 + log Z.
    assert (first["samples"], second["samples"]) == (10, 100)
    assert first["nll_lower"] == pytest.approx(6 / 4) and first["nll_upper"] == pytest.approx(6.4 / 4)
    assert second["nll_lower"] == pytest.approx(6.4 / 4) and second["nll_upper"] == pytest.approx(6.7 / 4)
    assert second["perplexity_lower"] == pytest.approx(math.exp(1.6))
    assert (second["log_z_lower"], second["log_z_upper"]) == (pytest.approx(0.2), pytest.approx(0.35))
    # Gains of the two sequences: −0.7 and 1.0.
    assert second["gain"] == pytest.approx(0.3 / 4)
    assert second["gain_standard_error"] == pytest.approx(statistics.stdev([-0.7, 1.0]) / math.sqrt(2) / 2)
    assert summary["steps"] == [
        {"step": 1, "base": pytest.approx(math.exp(2)), "lower": pytest.approx(math.e), "upper": pytest.approx(math.exp(2))},
        {"step": 2, "base": pytest.approx(math.exp(1.5)), "lower": pytest.approx(math.exp(1.5)), "upper": pytest.approx(math.exp(1.5))},
    ]
    assert summarize([one], [10, 100])["joint"][0]["gain_standard_error"] is None


def test_the_base_alone_has_steps_too():
    summary = summarize([{"index": 0, "base": [-1.0, -2.0]}], per_step=True)
    assert "joint" not in summary and summary["steps"][1] == {"step": 2, "base": pytest.approx(math.exp(2))}


def test_a_perplexity_beyond_all_numbers_is_infinite():
    assert perplexity(1e4) == math.inf and perplexity(2.0) == math.exp(2)
