"""Next-token probabilities of a joint model against their definition and against repeated estimation."""
import math

import pytest
import torch

from fairseq_earm.ebm.marginal import next_token

BASE = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()


def test_by_hand():
    neg_energies = torch.tensor([[1.0, 3.0], [2.0, 2.0], [4.0, 0.0]], dtype=torch.float64).log()
    weights = torch.tensor([0.5 * 2, 0.3 * 2, 0.2 * 2], dtype=torch.float64)
    found = next_token(BASE, neg_energies)
    torch.testing.assert_close(found.probability, weights / weights.sum())
    # Relative variances of the means: (2/4, 0, 8/4) / 2; shares .5, .3, .2.
    first, last = 0.5 * math.sqrt(0.25 * 0.25 + 0.04 * 1.0), 0.2 * math.sqrt(0.64 * 1.0 + 0.25 * 0.25)
    middle = 0.3 * math.sqrt(0.25 * 0.25 + 0.04 * 1.0)
    assert found.standard_error.tolist() == pytest.approx([first, middle, last])


def test_constants_cancel_and_nothing_overflows():
    torch.manual_seed(1)
    neg_energies = torch.randn(3, 50)
    expected = next_token(BASE, neg_energies)
    shifted = next_token(BASE - 7.0, neg_energies.double() + 2000.0)
    for one, other in zip(expected, shifted):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


def test_one_completion_is_weighted_as_it_is():
    neg_energies = torch.tensor([[0.0], [1.0], [-1.0]], dtype=torch.float64)
    found = next_token(BASE, neg_energies)
    torch.testing.assert_close(found.probability, (BASE + neg_energies[:, 0]).softmax(0))
    assert found.standard_error.tolist() == [0.0, 0.0, 0.0]


def test_standard_error_is_the_spread_of_repeated_estimates():
    torch.manual_seed(2)
    spread = torch.tensor([0.8, 0.3, 0.5], dtype=torch.float64).view(1, 3, 1)
    repeats = torch.randn(2000, 3, 100, dtype=torch.float64) * spread
    found = [next_token(BASE, neg_energies) for neg_energies in repeats]
    observed = torch.stack([each.probability for each in found]).std(0)
    claimed = torch.stack([each.standard_error for each in found]).mean(0)
    torch.testing.assert_close(claimed, observed, rtol=0.06, atol=0.0)
