"""Both estimates of log Z bracket the exact value in expectation and converge to it."""
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_earm.ebm.partition import log_partition

# A base distribution over three outcomes and their negated energies: everything about it can be summed.
PROBABILITIES = [0.2, 0.5, 0.3]
NEG_ENERGIES = [1.5, -0.5, 0.7]
LOG_Z = math.log(sum(p * math.exp(e) for p, e in zip(PROBABILITIES, NEG_ENERGIES)))


def expectations(n):
    """Exact expectation of both estimates from n samples, over all 3ⁿ outcomes."""
    outcomes = list(itertools.product(range(3), repeat=n))
    weights = torch.tensor([math.prod(PROBABILITIES[i] for i in outcome) for outcome in outcomes], dtype=torch.float64)
    bounds = log_partition(torch.tensor(NEG_ENERGIES, dtype=torch.float64)[torch.tensor(outcomes)])
    return (weights * bounds.lower).sum().item(), (weights * bounds.upper).sum().item()


def test_expectations_bracket_the_exact_value_and_close_in_on_it():
    widths = []
    for n in (2, 4, 8):
        lower, upper = expectations(n)
        assert lower < LOG_Z < upper
        widths.append(upper - lower)
    assert widths[0] > widths[1] > widths[2]


@settings(deadline=None)
@given(st.lists(st.floats(-700, 700), min_size=2, max_size=7))
def test_leave_one_out_is_the_direct_sum(values):
    n = len(values)
    tensor = torch.tensor(values, dtype=torch.float64)
    lower = tensor.logsumexp(0) - math.log(n)
    without = [torch.cat([tensor[:i], tensor[i + 1 :]]).logsumexp(0) - math.log(n - 1) for i in range(n)]
    upper = (2 * n - 1) * lower - 2 * (n - 1) * torch.stack(without).mean()
    bounds = log_partition(tensor)
    assert bounds.lower.item() == pytest.approx(lower.item(), abs=1e-9)
    assert bounds.upper.item() == pytest.approx(upper.item(), rel=1e-6, abs=1e-5)


def test_one_dominant_sample_and_many_samples_stay_finite():
    values = torch.zeros(100_000)
    values[3] = 500.0
    bounds = log_partition(values)
    assert math.isfinite(bounds.upper.item()) and bounds.lower.item() == pytest.approx(500 - math.log(1e5))
    single = log_partition(torch.tensor([2.0]))
    assert single.lower.item() == single.upper.item() == 2.0
