"""The history's baseline over all random batches there are: the mean of the gradient stays, its variance falls."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fairseq_earm.ebm import baseline, contrast
from fairseq_earm.ebm.baseline import history_baseline
from fairseq_earm.ebm.contrast import EarmSettings, Scored, batch_statistics
from fairseq_earm.ebm.earm import earm_loss
from fairseq_earm.ebm.energy import TokenEnergies
from tests.ebm.mutants import mutated_loss
from tests.oracles.tabular import EOS, TabularModel, gradient


def draws(model, source: int, limit: int) -> list:
    """[(sequence, probability)] of all that one negative can be: ended, or cut at `limit` tokens."""
    complete = [p for p in model.prefixes if p and (p[-1] == EOS or len(p) == limit) and len(p) <= limit]
    return [(sequence, model.log_q(source, sequence).exp().item()) for sequence in complete]


def gradients(model, data, data_sources, negatives, loss_function=earm_loss, *, energy_steps="all", **settings):
    """(P,) probabilities of all batches of negatives, and (P, parameters) the gradient of the loss on each.

    Args:
        negatives: [(data row, maximum length)], one for each negative of a batch.
    """
    post = energy_steps == "post"
    sources = torch.tensor([row for row, _ in negatives])
    limits = torch.tensor([limit for _, limit in negatives])
    probabilities, found = [], []
    for batch in itertools.product(*(draws(model, data_sources[row], limit) for row, limit in negatives)):
        positive = model.energies(data, data_sources, post=post)
        energies, mask = model.energies(
            [sequence for sequence, _ in batch], [data_sources[row] for row in sources], post=post
        )
        loss = loss_function(
            *positive, energies, mask, energy_steps=energy_steps, sources=sources, limits=limits, **settings
        ).loss
        grad = gradient(loss, model)
        found.append(torch.zeros_like(model.table) if grad is None else grad)
        probabilities.append(math.prod(probability for _, probability in batch))
    return torch.tensor(probabilities, dtype=torch.float64), torch.stack(found).flatten(1)


def moments(probabilities, found) -> tuple:
    """Mean (parameters,) and total variance of the gradient."""
    assert probabilities.sum().item() == pytest.approx(1)
    mean = (probabilities.unsqueeze(1) * found).sum(0)
    return mean, (probabilities * ((found - mean) ** 2).sum(1)).sum().item()


# Two words, one of them the end: lengths are random, and batches of four can be enumerated.
SHORT = {"vocabulary": 2, "length": 4, "sources": 2}
ROWS = [(1, 1, 0), (0,), (1, 1, 1, 1), (1, 0)]
BATCHES = {
    "one": [(0, 4)],
    "two": [(0, 4), (1, 4)],
    "four": [(0, 4), (0, 4), (1, 4), (2, 4)],
    "cut": [(0, 4), (1, 2), (2, 3)],
    "two of each": [(0, 4), (0, 4), (1, 4), (1, 4)],
}
SETTINGS = [
    {"recent_tokens": 1},
    {"recent_tokens": 2},
    {"recent_tokens": -1},
    {"recent_tokens": 2, "rao_blackwell": True},
    {"recent_tokens": 2, "energy_steps": "last"},
    {"recent_tokens": -1, "energy_steps": "last"},
    {"recent_tokens": 2, "energy_steps": "post"},
    {"recent_tokens": 1, "energy_steps": "post"},
]


@pytest.mark.parametrize("normalizer", ["batch", "source"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("negatives", BATCHES)
def test_the_mean_over_all_batches_is_the_same(negatives, settings, normalizer):
    if normalizer == "source" and negatives != "two of each":
        pytest.skip("every data row needs its negatives")
    model = TabularModel(**SHORT, seed=1)
    data = ROWS[:2] if normalizer == "source" else ROWS
    arguments = (model, data, [0, 1, 1, 0][: len(data)], BATCHES[negatives])
    plain, _ = moments(*gradients(*arguments, normalizer=normalizer, **settings))
    reduced, _ = moments(*gradients(*arguments, normalizer=normalizer, baseline=True, **settings))
    assert (reduced - plain).norm() < 1e-13 * plain.norm()


# Three words: which one a sequence goes on with is random too, and its score is noise.
WORDS = {"vocabulary": 3, "length": 3, "sources": 1, "seed": 2}
SENTENCES = [(1, 2, 0), (1, 0), (1, 1, 1), (2, 1, 0), (0,), (2, 2, 2)]


@pytest.mark.parametrize(
    "settings, at_most",
    [
        ({"recent_tokens": 2}, 0.4),
        ({"recent_tokens": 2, "rao_blackwell": True}, 0.85),
        ({"recent_tokens": -1, "rao_blackwell": True}, 0.85),
        ({"recent_tokens": 2, "energy_steps": "last"}, 0.5),
        ({"recent_tokens": 2, "energy_steps": "post"}, 0.45),
    ],
)
def test_the_variance_over_all_batches_falls(settings, at_most):
    model, found = TabularModel(**WORDS), []
    for reduced in (False, True):
        found.append(moments(*gradients(model, SENTENCES, [0] * 6, [(0, 3), (1, 3)], baseline=reduced, **settings)))
    assert (found[0][0] - found[1][0]).norm() < 1e-13 * found[0][0].norm()
    assert found[1][1] < at_most * found[0][1]


@pytest.mark.parametrize("negatives", [4, 16])
def test_the_variance_falls_with_many_negatives_too(negatives):
    """Batches drawn at random: the upper end of a 99 % interval of the ratio of variances lies below 1."""
    model, generator = TabularModel(**WORDS), torch.Generator().manual_seed(0)
    sequences, probabilities = zip(*draws(model, 0, 3))
    chosen = torch.multinomial(torch.tensor(probabilities), 300 * negatives, True, generator=generator).view(
        300, negatives
    )
    found = {False: [], True: []}
    for batch in chosen.tolist():
        for reduced, kept in found.items():
            phases = (
                *model.energies(SENTENCES, [0] * 6),
                *model.energies([sequences[i] for i in batch], [0] * negatives),
            )
            loss = earm_loss(*phases, baseline=reduced, rao_blackwell=True, limits=torch.full((negatives,), 3)).loss
            kept.append(gradient(loss, model).flatten())
    squares = {
        reduced: (torch.stack(kept) - torch.stack(kept).mean(0)).square().sum(1) for reduced, kept in found.items()
    }
    draws_of_batches = torch.randint(300, (1000, 300), generator=generator)
    ratios = squares[True][draws_of_batches].mean(1) / squares[False][draws_of_batches].mean(1)
    assert ratios.quantile(0.995) < 1


def test_tokens_that_are_given_have_no_part_in_it():
    model, given = TabularModel(**WORDS), 1

    def loss_after_prefix(positive, positive_mask, negative, negative_mask, **settings):
        masks = [mask & (torch.arange(mask.size(1)) >= given) for mask in (positive_mask, negative_mask)]
        return earm_loss(positive, masks[0], negative, masks[1], **settings)

    found = []
    for reduced in (False, True):
        probabilities, each = gradients(
            model, SENTENCES, [0] * 6, [(0, 3), (1, 3)], loss_after_prefix, baseline=reduced
        )
        assert each.view(len(each), *model.table.shape)[:, model.row[0, ()]].abs().max() == 0
        found.append(moments(probabilities, each))
    assert (found[0][0] - found[1][0]).norm() < 1e-13 * found[0][0].norm()
    assert found[1][1] < found[0][1]


def test_under_a_moving_normaliser_the_mean_is_the_same():
    model = TabularModel(**SHORT, seed=3)
    arguments = (model, ROWS, [0, 1, 1, 0], BATCHES["two"])
    moving = {"log_normalizer": torch.linspace(-0.5, 1.0, 5, dtype=torch.float64)}
    plain, before = moments(*gradients(*arguments, **moving))
    reduced, after = moments(*gradients(*arguments, **moving, baseline=True))
    assert (reduced - plain).norm() < 1e-13 * plain.norm() and after < before


# What goes wrong, where, the line as it is, the line as it would be; and what notices: the mean or the variance.
FAULTS = [
    (
        "rows that end left out",
        contrast,
        "(nll - nll.detach()), negatives.mask)",
        "(nll - nll.detach()), negatives.mask & F.pad(negatives.mask[:, 1:], (0, 1)))",
        "mean",
    ),
    (
        "an indicator of reach",
        baseline,
        "later = [_shift(rows, lag)",
        "reached = group_counts(model_mask, model_group, num_groups) > 0; later = [_shift(rows * reached, lag)",
        "mean",
    ),
    (
        "the next step's coefficient",
        contrast,
        "coefficients = history_baseline(settings, statistics, negatives.mask.size(1), limits, groups)",
        "coefficients = F.pad(history_baseline(settings, statistics, negatives.mask.size(1), limits, groups)[:, 1:], "
        "(0, 1))",
        "mean",
    ),
    (
        "negatives counted at the later step",
        baseline,
        "group_counts(model_mask & _reaches(",
        "group_counts(_shift(model_mask, lag) & _reaches(",
        "mean",
    ),
    (
        "the weight of the row itself",
        contrast,
        "coefficients = history_baseline(settings, statistics, negatives.mask.size(1), limits, groups)",
        "coefficients = history_baseline(settings, statistics, negatives.mask.size(1), limits, groups) * "
        "negatives.energies.nll.detach()",
        "mean",
    ),
    (
        "data counted a step too late",
        baseline,
        "later = [_shift(rows, lag)",
        "later = [_shift(rows, lag + 1)",
        "variance",
    ),
    (
        "one lag too many",
        baseline,
        "return most if settings.recent_tokens < 0 else min(settings.recent_tokens, most)",
        "return most if settings.recent_tokens < 0 else min(settings.recent_tokens + 1, most)",
        "variance",
    ),
    (
        "rows that cannot get there counted",
        baseline,
        "return limits.unsqueeze(1) >= ",
        "return limits.unsqueeze(1) + 9 >= ",
        "variance",
    ),
]


@pytest.mark.parametrize(
    "fault, module, line, replacement, notices", FAULTS, ids=[fault[0].replace(" ", "-") for fault in FAULTS]
)
def test_every_fault_is_caught(fault, module, line, replacement, notices):
    model = TabularModel(**SHORT, seed=1)
    arguments = (model, ROWS, [0, 1, 1, 0], BATCHES["cut"])
    right = moments(*gradients(*arguments, recent_tokens=2, baseline=True))
    wrong = moments(*gradients(*arguments, mutated_loss(module, line, replacement), recent_tokens=2, baseline=True))
    if notices == "mean":
        assert (wrong[0] - right[0]).norm() > 0.01 * right[0].norm()
    else:
        assert (wrong[0] - right[0]).norm() < 1e-13 * right[0].norm()
        assert abs(wrong[1] - right[1]) > 0.01 * right[1]


@pytest.mark.parametrize("energy_steps, shares", [("last", [1 / 4, 2 / 3, 0.0]), ("post", [1 / 4, 1 / 3, 1.0])])
def test_one_energy_a_row_is_expected_where_the_data_have_it(energy_steps, shares):
    """Lengths 1, 2, 3, 3: how many of the rows that say token l have their energy step in the one step after it."""
    mask = torch.arange(3 + (energy_steps == "post")) < torch.tensor([1, 2, 3, 3]).unsqueeze(1) + (
        energy_steps == "post"
    )
    settings = EarmSettings(recent_tokens=1, energy_steps=energy_steps, baseline=True)
    zeros = torch.zeros(mask.shape)
    statistics = batch_statistics(settings, mask, Scored(TokenEnergies(zeros, zeros), mask))
    found = history_baseline(settings, statistics, 3, None, torch.zeros(4, dtype=torch.long))
    assert found.tolist() == [pytest.approx(shares)] * 4


def coefficients(lengths, data_lengths, **settings):
    """(R,) what the score of each negative's first token is weighed by, with flat weights."""

    def phase(of):
        mask = torch.arange(max(of)) < torch.tensor(of).unsqueeze(1)
        return TokenEnergies(torch.zeros(mask.shape), torch.zeros(mask.shape).requires_grad_()), mask

    negative, negative_mask = phase(lengths)
    found = earm_loss(*phase(data_lengths), negative, negative_mask, rao_blackwell=True, **settings).negative_phase
    return -torch.autograd.grad(found, negative.target_logit)[0][:, 0]


def test_with_flat_weights_the_share_of_rows_that_end_is_left():
    """One lag: six of eight negatives go on, so a quarter of the squared coefficients is left; their sum becomes 0."""
    lengths, data = [2] * 6 + [1] * 2, [2, 2, 2, 1]
    before, after = (coefficients(lengths, data, recent_tokens=1, baseline=reduced) for reduced in (False, True))
    assert before.tolist() == [3 / 6] * 6 + [0] * 2
    assert after.tolist() == [3 / 6 - 3 / 8] * 6 + [-3 / 8] * 2
    assert (after.square().sum() / before.square().sum()).item() == pytest.approx(1 - 6 / 8)


def test_rows_that_cannot_get_there_have_no_baseline():
    """Three negatives may have two tokens, of which two do; the fourth was cut at one, and is left alone."""
    limits = torch.tensor([2, 2, 2, 1])
    found = coefficients([2, 2, 1, 1], [2, 2, 1], recent_tokens=1, baseline=True, limits=limits)
    assert found.tolist() == pytest.approx([1 - 2 / 3, 1 - 2 / 3, -2 / 3, 0])


def test_where_nothing_ends_flat_weights_have_no_history():
    """Text of fixed length: the baseline is the coefficient."""
    lengths, limits = [3] * 4, torch.full((4,), 3)
    before, after = (coefficients(lengths, [3, 3], recent_tokens=2, baseline=b, limits=limits) for b in (False, True))
    assert before.tolist() == [1.0] * 4 and after.tolist() == [0.0] * 4
