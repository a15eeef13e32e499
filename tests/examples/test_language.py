"""The synthetic language: its probabilities are exact and its agreements hold."""
import math
import random
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "synthetic"))
import language  # noqa: E402

SHORT = [
    ("h0", "n1", "n2"),
    ("h2", "a1", "n3", "n0"),
    ("h1", "o0", "n1", "c0"),
    ("h0", "o1", "a0", "n2", "o2", "n5", "c2", "c1", "n3"),
]
# Register 0 is of the first gender, f; the clause opens in m, the particle and the closing word agree with it.
SOURCE = ("h0", "o1", "n2", "a0", "n4", "c1", "n3")
TARGET = "H0 O1m Pm N2y A0m N4x C1m N3x T0".split()


@pytest.mark.parametrize("source", SHORT, ids=" ".join)
def test_translations_sum_to_one_and_have_the_computed_entropy(source):
    targets = list(language.translations(source))
    assert len({t for t, _ in targets}) == len(targets)
    assert math.fsum(p for _, p in targets) == pytest.approx(1, abs=1e-12)
    assert language.entropy(source) == pytest.approx(-math.fsum(p * math.log(p) for _, p in targets), abs=1e-9)
    for target, probability in targets:
        assert language.log_probability(source, target) == pytest.approx(math.log(probability), abs=1e-9)


def test_sampler_follows_the_probabilities():
    source, draws = SHORT[0], 20_000
    rng = random.Random(5)
    counts = Counter(language.sample_target(source, rng) for _ in range(draws))
    expected = {target: p * draws for target, p in language.translations(source)}
    assert set(counts) <= set(expected)
    common = [t for t in expected if expected[t] >= 5]
    rare = sum(expected[t] for t in expected if expected[t] < 5)
    seen = draws - sum(counts[t] for t in common)
    statistic = sum((counts[t] - expected[t]) ** 2 / expected[t] for t in common) + (seen - rare) ** 2 / max(rare, 1)
    # Mean and standard deviation of chi-square with k degrees of freedom: k and sqrt(2k).
    freedom = len(common)
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


def test_mean_log_probability_of_samples_is_the_entropy():
    rng = random.Random(6)
    source = language.sample_source(rng)
    values = [language.log_probability(source, language.sample_target(source, rng)) for _ in range(4_000)]
    mean = sum(values) / len(values)
    error = (sum((v - mean) ** 2 for v in values) / len(values) ** 2) ** 0.5
    assert abs(-mean - language.entropy(source)) < 4 * error


def test_lengths_vocabulary_and_membership_of_drawn_pairs():
    pairs = language.sample_pairs(3_000, seed=1)
    lengths = [len(target) for _, target in pairs]
    assert language.MIN_LENGTH <= min(lengths) and max(lengths) <= language.MAX_LENGTH
    assert max(lengths) >= 30
    assert 40 <= len({word for _, target in pairs for word in target}) <= 60
    assert all(language.is_translation(source, target) for source, target in pairs)


def test_same_seed_same_pairs():
    assert language.sample_pairs(50, seed=7) == language.sample_pairs(50, seed=7)
    assert language.sample_pairs(50, seed=7) != language.sample_pairs(50, seed=8)


def test_ambiguity_is_real():
    source = ("h0", "a0", "n1", "n2")
    targets = [t for t, _ in language.translations(source)]
    assert ("H0", "A0f", "N1x", "N2x", "T0") in targets and ("H0", "N1x", "A0f", "N2x", "T0") in targets
    assert ("H0", "A0f", "N1x", "Pf", "N2y", "T0") in targets
    assert ("H3", "N1y", "A0m", "N2y", "T3") in targets


def test_a_right_translation_belongs():
    assert language.is_translation(SOURCE, TARGET)


@pytest.mark.parametrize(
    "position, wrong",
    [(8, "T1"), (6, "C1f"), (6, "C0m"), (2, "Pf"), (4, "A0f"), (7, "N2x"), (0, "H2"), (1, "O1f")],
    ids=["tail", "closing gender", "closing type", "particle", "adjective", "noun", "head", "opening"],
)
def test_violated_agreement_is_not_in_the_language(position, wrong):
    target = list(TARGET)
    target[position] = wrong
    assert language.log_probability(SOURCE, target) == -math.inf


@pytest.mark.parametrize("target", [TARGET[:-1], TARGET + ["T0"], [], TARGET[:2] + ["Pm"] + TARGET[2:]])
def test_incomplete_or_overlong_is_not_in_the_language(target):
    assert not language.is_translation(SOURCE, target)
