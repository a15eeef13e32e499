"""Both estimates of log Z bracket the exact value in expectation and converge to it; steps add up to sequences."""
import itertools
import math
from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_earm.ebm.partition import (
    LogPartition, exact_log_partition, joint_log_prob, log_partition, stepwise_log_probs,
)
from tests.oracles.residual import ListedJoint

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


def test_the_upper_estimate_keeps_its_digits_with_one_dominant_sample_among_100_000():
    # A dominant sample, and 1000 times each of 100 others but for one.
    others = [math.sin(i) for i in range(100)]
    values = [30.0] + (others * 1000)[1:]
    n = len(values)
    with localcontext() as context:
        context.prec = 50
        counted = [(Decimal(30).exp(), 1)] + [(Decimal(v).exp(), 1000 - (i == 0)) for i, v in enumerate(others)]
        total = sum(count * weight for weight, count in counted)
        lower = (total / n).ln()
        left_out = sum(count * ((total - weight) / (n - 1)).ln() for weight, count in counted) / n
        upper = (2 * n - 1) * lower - 2 * (n - 1) * left_out
    bounds = log_partition(torch.tensor(values, dtype=torch.float64))
    assert bounds.lower.item() == pytest.approx(float(lower), abs=1e-12)
    assert bounds.upper.item() == pytest.approx(float(upper), abs=1e-6)


@pytest.fixture
def listed():
    """Every sequence of three tokens out of four, with random probabilities and energies."""
    torch.manual_seed(2)
    sequences = list(itertools.product(range(4), repeat=3))
    log_probs = torch.randn(64, dtype=torch.float64).log_softmax(0).tolist()
    energies = (1.5 * torch.randn(64, dtype=torch.float64)).tolist()
    return ListedJoint(dict(zip(sequences, log_probs)), dict(zip(sequences, energies)))


def base_steps(listed, x):
    masses = [listed.log_mass(x[:t], energy=False) for t in range(4)]
    return torch.tensor([b - a for a, b in zip(masses, masses[1:])], dtype=torch.float64)


def test_steps_with_exact_expectations_are_the_joint_model_s_and_multiply_to_the_sequence_s_probability(listed):
    for x in ((0, 0, 0), (1, 3, 2), (2, 0, 1)):
        completions = torch.tensor([listed.log_completion(x[:t]) for t in range(4)], dtype=torch.float64)
        assert completions[-1].item() == pytest.approx(-listed.energies[x], abs=1e-12)
        for steps in stepwise_log_probs(base_steps(listed, x), LogPartition(completions, completions)):
            assert steps.tolist() == pytest.approx([listed.step_log_prob(x, t) for t in (1, 2, 3)], abs=1e-12)
            assert steps.sum().item() == pytest.approx(listed.log_prob(x), abs=1e-12)


def test_lower_steps_have_the_lower_numerator_over_the_upper_denominator():
    completions = LogPartition(torch.tensor([0.0, 1.0, 5.0]), torch.tensor([0.5, 3.0, 5.0]))
    steps = stepwise_log_probs(torch.tensor([-1.0, -2.0]), completions)
    assert steps.lower.tolist() == [-1 + 1 - 0.5, -2 + 5 - 3] and steps.upper.tolist() == [-1 + 3 - 0, -2 + 5 - 1]


def test_the_lower_log_z_gives_the_upper_probability(listed):
    x, log_z = (3, 1, 0), listed.log_z()
    bounds = LogPartition(torch.tensor(log_z - 0.1), torch.tensor(log_z + 0.3))
    joint = joint_log_prob(torch.tensor(listed.log_probs[x]), torch.tensor(listed.energies[x]), bounds)
    assert joint.upper.item() == pytest.approx(listed.log_prob(x) + 0.1, abs=1e-6)
    assert joint.lower.item() == pytest.approx(listed.log_prob(x) - 0.3, abs=1e-6)


def test_log_z_of_listed_sequences_is_exact(listed):
    log_probs, energies = (torch.tensor(list(table.values()), dtype=torch.float64) for table in (listed.log_probs, listed.energies))
    bounds = exact_log_partition(log_probs, -energies)
    assert bounds.lower.item() == bounds.upper.item() == pytest.approx(listed.log_z(), abs=1e-12)
