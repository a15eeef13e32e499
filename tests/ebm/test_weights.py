"""Importance weights, their normalisers, effective sample size and resampling."""
import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_earm.ebm.weights import (
    StepStatistics, effective_sample_size, grouped_log_sum_exp, join_statistics, log_importance_weights, moving_log_normalizer,
    no_statistics, resample, step_log_normalizer, step_statistics,
)

numbers = st.floats(-600, 600, allow_nan=False)


@settings(deadline=None)
@given(st.lists(st.tuples(numbers, st.booleans(), st.integers(0, 2)), min_size=1, max_size=8))
def test_grouped_log_sum_exp(rows):
    values = torch.tensor([[value] for value, _, _ in rows], dtype=torch.float64)
    mask = torch.tensor([[alive] for _, alive, _ in rows])
    groups = torch.tensor([group for _, _, group in rows])
    result = grouped_log_sum_exp(values, mask, groups, 3)
    for group in range(3):
        members = [value for value, alive, g in rows if alive and g == group]
        if not members:
            assert result[group].item() == -math.inf
            continue
        peak = max(members)
        expected = peak + math.log(math.fsum(math.exp(v - peak) for v in members))
        assert result[group].item() == pytest.approx(expected, abs=1e-9)


def test_weights_have_mean_one_at_every_step_among_the_living():
    generator = torch.Generator().manual_seed(0)
    logsumexp = 50 * torch.randn(5, 4, generator=generator, dtype=torch.float64)
    mask = torch.arange(4) < torch.tensor([[4], [2], [3], [1], [4]])
    log_weights = log_importance_weights(logsumexp.requires_grad_(), mask)
    assert not log_weights.requires_grad
    assert log_weights[~mask].eq(-math.inf).all()
    assert torch.allclose(log_weights.exp().sum(0) / mask.sum(0), torch.ones(4, dtype=torch.float64))
    fixed = log_importance_weights(logsumexp, mask, log_normalizer=torch.ones(4, dtype=torch.float64))
    assert torch.allclose(fixed[mask], (logsumexp - 1)[mask])


def test_step_without_a_row_has_no_normaliser():
    normalizer = step_log_normalizer(torch.zeros(2, 3), torch.tensor([[True, True, False]] * 2))
    assert normalizer.tolist() == [0, 0, -math.inf]


def test_moving_normaliser():
    first = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert moving_log_normalizer(None, first, 0.9) is first
    moved = moving_log_normalizer(first, torch.tensor([3.0, -math.inf, 4.0], dtype=torch.float64), 0.9)
    expected = math.log(0.9 * math.exp(1) + 0.1 * math.exp(3))
    assert moved.tolist() == pytest.approx([expected, 2.0, 4.0])
    shorter = moving_log_normalizer(moved, torch.tensor([0.0], dtype=torch.float64), 0.5)
    assert shorter[1:].tolist() == moved[1:].tolist()


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-1e4, 1e4), st.booleans(), st.booleans(), st.integers(0, 2)), min_size=1, max_size=8))
def test_statistics_of_parts_join_to_those_of_the_whole(rows):
    values, alive, data, part = (torch.tensor(column).unsqueeze(1) for column in zip(*rows))
    values, part = values.double(), part.squeeze(1)
    together = torch.zeros_like(part)
    whole = step_statistics(values, alive, together, data, together, 1)
    parts = step_statistics(values, alive, part, data, part, 3)
    parts = StepStatistics(*(torch.cat(pair) for pair in zip(parts, no_statistics(1))))
    torch.testing.assert_close(tuple(join_statistics(parts)), tuple(whole), rtol=1e-12, atol=1e-9)
    if alive.any():
        weights = log_importance_weights(values, alive)
        assert whole.log_normalizer.item() == pytest.approx(step_log_normalizer(values, alive).item(), abs=1e-9)
        assert whole.relative_ess.item() == pytest.approx(effective_sample_size(weights).item() / alive.sum().item())


@settings(deadline=None)
@given(st.lists(numbers, min_size=1, max_size=10))
def test_effective_sample_size_is_kishs(values):
    log_weights = torch.tensor(values, dtype=torch.float64)
    weights = (log_weights - log_weights.max()).exp()
    size = effective_sample_size(log_weights).item()
    assert size == pytest.approx((weights.sum() ** 2 / (weights**2).sum()).item())
    assert 1 - 1e-9 <= size <= len(values) + 1e-9


def test_effective_sample_size_of_the_dead_is_zero():
    log_weights = torch.tensor([[0.0, -math.inf], [0.0, -math.inf]])
    assert effective_sample_size(log_weights).tolist() == [2.0, 0.0]


def test_resampling_draws_in_proportion_and_without_replacement():
    weights = [0.5, 0.3, 0.2]
    draws = 20_000
    log_weights = torch.tensor(weights).log().expand(draws, 3) + 700  # any offset
    orders = resample(log_weights, torch.Generator().manual_seed(0)).tolist()
    counts = Counter(map(tuple, orders))
    for order in itertools.permutations(range(3)):
        first, second, _ = (weights[i] for i in order)
        expected = draws * first * second / (1 - first)
        assert abs(counts[order] - expected) < 5 * math.sqrt(expected)
    assert resample(torch.tensor([-math.inf, 0.0]))[0] == 1
