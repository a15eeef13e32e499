"""Objectives and controls: their gradients, what they forget of the energy, and where their optimum lies."""

from __future__ import annotations

import math

import pytest
import torch

from fairseq_earm.ebm.contrast import EarmSettings, Scored, contrast, steps_with_energy
from fairseq_earm.ebm.earm import nll_terms
from fairseq_earm.ebm.energy import TokenEnergies
from fairseq_earm.ebm.objectives import OBJECTIVES, flat, kl, likelihood, nce, noise
from tests.ebm.test_earm import DATA, DATA_SOURCES, relative_error
from tests.oracles.tabular import TabularModel, gradient


def found(model, objective, data=DATA, data_sources=DATA_SOURCES, negatives=None, **settings):
    """An objective's loss on data, with negatives distributed as q or given."""
    sequences, sources = model.exact_batch() if negatives is None else negatives
    post = settings.get("energy_steps") == "post"
    limits = settings.pop("limits", None)
    phases = [Scored(*model.energies(*rows, post=post)) for rows in ((data, data_sources), (sequences, sources))]
    return objective(contrast(EarmSettings(**settings), *phases, sources=torch.as_tensor(sources), limits=limits))


def shifted(model, shift):
    """The same model with offsets (rows, 1) added to its logits: q stays, the energy moves."""
    other = TabularModel()
    other.__dict__.update(model.__dict__)
    other.table = (model.table.detach() + shift).requires_grad_()
    return other


@pytest.mark.parametrize("normalizer", ["batch", "source"])
@pytest.mark.parametrize("energy_steps_of", ["all", "last", "post"])
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=list(OBJECTIVES))
def test_a_shift_of_all_logits_has_no_gradient(objective, energy_steps_of, normalizer):
    """Even of few negatives, which do not reach all of the data's steps."""
    model = TabularModel(seed=1)
    negatives = [(1, 0), (2, 0), (1, 1, 0), (0,), (1, 2, 0)], [0, 0, 1, 1, 1]
    settings = {"energy_steps": energy_steps_of, "normalizer": normalizer}
    grad = gradient(found(model, objective, [(1, 2, 1), (2, 1, 0)], [0, 1], negatives, **settings).loss, model)
    assert grad.norm() > 0.1
    assert abs(grad.sum().item()) < 1e-12


def test_a_normaliser_held_fixed_would_let_it_drift():
    """The trap: with log Z detached an uninformative energy is pushed along the shift."""
    model = TabularModel(seed=1)
    sequences, sources = model.exact_batch()
    phases = [Scored(*model.energies(*rows)) for rows in ((sequences, sources), (sequences, sources))]
    settings = EarmSettings()
    through = gradient(nce(contrast(settings, *phases)).loss, model).sum()
    contrasted = contrast(
        settings, *[Scored(*model.energies(*rows)) for rows in ((sequences, sources), (sequences, sources))]
    )
    fixed = contrasted.log_normalizer
    t = [steps.logsumexp - fixed for steps in (contrasted.data, contrasted.negatives)]
    loss = sum(
        torch.nn.functional.softplus(sign * each)[steps.mask].sum()
        for sign, each, steps in zip((-1, 1), t, (contrasted.data, contrasted.negatives))
    )
    drift = gradient(loss, model).sum()
    assert abs(through) < 1e-10
    variance = [t[1].detach()[:, k][contrasted.negatives.mask[:, k]].exp().var(unbiased=False).item() for k in range(3)]
    assert max(variance) > 0.1 and drift < -1


def test_nce_is_logistic_regression_at_every_step():
    """Against a sum over single rows, with the counts of both sides in the logit."""
    model = TabularModel(seed=2)
    negatives = [(1, 0), (2, 2, 0), (1, 1, 1), (0,), (1, 2, 0)], torch.tensor([0, 0, 1, 1, 0])
    loss = found(model, nce, negatives=negatives, recent_tokens=1).loss
    rows = {"data": list(zip(DATA, DATA_SOURCES.tolist())), "negatives": list(zip(negatives[0], negatives[1].tolist()))}
    expected = torch.zeros((), dtype=torch.float64)
    for k in range(3):
        lse = {
            side: [model.logits(source, row[:k]).logsumexp(-1) for row, source in kept if len(row) > k]
            for side, kept in rows.items()
        }
        log_z = torch.stack(lse["negatives"]).logsumexp(0) - math.log(len(lse["negatives"]))
        ratio = len(lse["negatives"]) / len(lse["data"])
        for side, label in (("data", 1), ("negatives", 0)):
            for each in lse[side]:
                probability = (each - log_z).exp() / ((each - log_z).exp() + ratio)  # that it is data
                expected = expected - (probability if label else 1 - probability).log()
    expected = expected + nll_terms(*model.energies(DATA, DATA_SOURCES), recent_tokens=1)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert relative_error(gradient(loss, model), gradient(expected, model)) < 1e-10


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=list(OBJECTIVES))
def test_at_the_optimum_the_energy_is_the_log_ratio(objective):
    """q fixed, offsets free: lse_k − log Z_k = log P_data(x_<k) − log q(x_<k), both given that k is reached."""
    model, truth = TabularModel(sources=1, seed=1), TabularModel(sources=1, seed=5)
    data, data_sources = truth.exact_batch()
    sequences, sources = model.exact_batch()

    def log_alive(of, prefix, k):
        """log P(prefix | alive at step k + 1) of a prefix of k tokens."""
        alive = [p for p in of.prefixes if len(p) == k and not of.is_complete(p)]
        return of.log_q(0, prefix) - torch.stack([of.log_q(0, p) for p in alive]).logsumexp(0)

    shift = torch.zeros(len(model.row), 1, dtype=torch.float64)
    for (_, prefix), row in model.row.items():
        if not model.is_complete(prefix):
            k = len(prefix)
            ratio = (log_alive(truth, prefix, k) - log_alive(model, prefix, k)).detach()
            shift[row] = ratio - model.table[row].logsumexp(-1).detach()
    right = shifted(model, shift)
    arguments = {
        "data": data,
        "data_sources": data_sources,
        "negatives": (sequences, sources),
        "recent_tokens": 0,
        "rao_blackwell": objective is kl,
    }
    # What is left of the gradient along the offsets, which the likelihood does not see.
    assert gradient(found(right, objective, **arguments).loss, right).sum(1).abs().max() < 1e-10
    assert gradient(found(model, objective, **arguments).loss, model).sum(1).abs().max() > 1
    wrong = shifted(model, 0.9 * shift)
    assert gradient(found(wrong, objective, **arguments).loss, wrong).sum(1).abs().max() > 1e-2


def test_nce_learns_that_optimum_from_anywhere():
    model, truth = TabularModel(sources=1, seed=1), TabularModel(sources=1, seed=5)
    data, data_sources = truth.exact_batch()
    offsets = torch.zeros(len(model.row), 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [offsets], max_iter=500, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )
    fixed = model.table.detach()

    def closure():
        optimizer.zero_grad()
        moved = shifted(model, 0)
        moved.table = fixed + offsets
        loss = found(moved, nce, data, data_sources, recent_tokens=0).loss
        loss.backward()
        return loss

    optimizer.step(closure)
    lse = (fixed + offsets.detach()).logsumexp(-1)
    first = [lse[model.row[0, (word,)]] for word in (1, 2)]
    of_data, of_q = ([of.log_q(0, (word,)).item() for word in (1, 2)] for of in (truth, model))
    assert (first[0] - first[1]).item() == pytest.approx((of_data[0] - of_data[1]) - (of_q[0] - of_q[1]), abs=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{}, {"rao_blackwell": True}, {"recent_tokens": 0}, {"energy_steps": "last"}, {"energy_steps": "post"}],
    ids=str,
)
def test_noise_is_kl_without_its_energy(settings):
    """By its own words: φ is the NLL or, under Rao-Blackwell, nothing; weights are flat; counts match."""
    model = TabularModel(seed=3)
    negatives = [(1, 0), (2, 2, 0), (1, 1, 1), (0,), (1, 2, 0)], torch.tensor([0, 0, 1, 1, 0])
    post = settings.get("energy_steps") == "post"
    loss = found(model, noise, negatives=negatives, **settings).loss
    steps = [
        steps_with_energy(EarmSettings(**settings), Scored(*model.energies(*rows, post=post)))
        for rows in ((DATA, DATA_SOURCES), negatives)
    ]
    expected = torch.zeros((), dtype=torch.float64)
    for k in range(steps[0].mask.size(1)):
        (data, nll), (model_rows, own) = (
            (
                s.mask[:, k],
                s.history[:, k] + (0 if side and settings.get("rao_blackwell") else s.phi[:, k] + s.logsumexp[:, k]),
            )
            for side, s in enumerate(steps)
        )
        if model_rows.any():
            expected = expected + nll[data].sum() - data.sum() * own[model_rows].mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert relative_error(gradient(loss, model), gradient(expected, model)) < 1e-12


@pytest.mark.parametrize("baseline", [False, True])
@pytest.mark.parametrize("rao_blackwell", [False, True])
def test_noise_descends_the_likelihood_given_that_a_step_is_reached(rao_blackwell, baseline):
    """Over all of q: the likelihood control, and for each step the log-probability that q reaches it."""
    model = TabularModel(seed=4)
    loss = found(model, noise, rao_blackwell=rao_blackwell, baseline=baseline).loss
    expected = nll_terms(*model.energies(DATA, DATA_SOURCES))
    for k in range(3):
        reached = [
            model.log_q(source, p).exp()
            for source in (0, 1)
            for p in model.prefixes
            if len(p) == k and not model.is_complete(p)
        ]
        expected = expected + sum(len(row) > k for row in DATA) * torch.stack(reached).mean().log()
    assert relative_error(gradient(loss, model), gradient(expected, model)) < 1e-12


def test_noise_and_likelihood_do_not_see_the_offsets():
    model, generator = TabularModel(seed=4), torch.Generator().manual_seed(0)
    moved = shifted(model, torch.randn(len(model.row), 1, generator=generator, dtype=torch.float64))
    losses = [found(each, noise, negatives=([(1, 0), (2, 1, 0)], torch.tensor([0, 1]))) for each in (model, moved)]
    assert losses[0].loss.item() == pytest.approx(losses[1].loss.item(), rel=1e-12)
    assert gradient(losses[1].loss, moved).sum(1).abs().max() < 1e-12
    assert losses[0].dv.item() != pytest.approx(losses[1].dv.item())  # the log still shows the energy it does not train


def test_flat_is_likelihood_and_the_variance_of_the_data_s_energies():
    model = TabularModel(seed=2)
    steps = steps_with_energy(EarmSettings(), Scored(*model.energies(DATA, DATA_SOURCES)))
    expected = likelihood(steps)
    for k in range(3):
        lse = steps.logsumexp[:, k][steps.mask[:, k]]
        expected = expected + 0.7 * len(lse) * lse.var(unbiased=False)
    loss = flat(steps_with_energy(EarmSettings(), Scored(*model.energies(DATA, DATA_SOURCES))), 0.7)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert relative_error(gradient(loss, model), gradient(expected, model)) < 1e-12
    level = TokenEnergies(torch.ones(2, 3), torch.zeros(2, 3))
    steps = steps_with_energy(EarmSettings(), Scored(level, torch.ones(2, 3, dtype=torch.bool)))
    assert flat(steps, 9.0) == likelihood(steps)


@pytest.mark.parametrize("objective", [kl, nce, noise])
def test_what_no_negative_reaches_is_left_out_without_a_nan(objective):
    model = TabularModel(seed=0)
    loss = found(model, objective, negatives=([(0,), (0,)], torch.tensor([0, 1])))
    grad = gradient(loss.loss, model)
    assert loss.data_steps == len(DATA) and torch.isfinite(grad).all() and torch.isfinite(loss.loss)
    nobody = Scored(TokenEnergies(torch.randn(1, 2), torch.randn(1, 2)), torch.zeros(1, 2, dtype=torch.bool))
    data = Scored(
        TokenEnergies(torch.randn(2, 2).requires_grad_(), torch.randn(2, 2)), torch.ones(2, 2, dtype=torch.bool)
    )
    alone = objective(contrast(EarmSettings(baseline=True), data, nobody))
    [grad] = torch.autograd.grad(alone.loss, data.energies.logsumexp)
    assert torch.isfinite(alone.loss) and torch.isfinite(grad).all()


def test_gradients_of_nce_are_those_of_its_value():
    torch.manual_seed(0)
    mask = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])

    def loss(*energies):
        data, negatives = (Scored(TokenEnergies(*pair), mask) for pair in (energies[:2], energies[2:]))
        return nce(contrast(EarmSettings(), data, negatives)).loss

    assert torch.autograd.gradcheck(
        loss, [torch.randn(3, 3, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    )
