"""E-ARM's loss against the exact gradient of Eq. 6, by enumeration; and that no slip goes unnoticed."""
from __future__ import annotations

import pytest
import torch

from fairseq_earm.ebm import contrast, objectives, weights
from fairseq_earm.ebm.contrast import EarmSettings, Scored, batch_statistics, history
from fairseq_earm.ebm.earm import earm_loss, nll_terms
from fairseq_earm.ebm.energy import TokenEnergies, token_energies
from fairseq_earm.ebm.weights import StepStatistics, join_statistics, no_statistics
from tests.ebm.mutants import mutated_loss
from tests.oracles.tabular import TabularModel, exact_objective, gradient

DATA = [(1, 0), (2, 1, 0), (0,), (1, 2, 2), (2, 0), (1, 1, 0), (1, 0), (2, 2, 0)]
DATA_SOURCES = torch.tensor([0, 1, 0, 1, 1, 0, 0, 1])


def estimate(model, loss_function=earm_loss, *, energy_steps="all", normalizer="batch", **settings):
    """The loss on DATA with negatives that are distributed exactly as q."""
    post = energy_steps == "post"
    sequences, sources = model.exact_batch()
    positive, positive_mask = model.energies(DATA, DATA_SOURCES, post=post)
    negative, negative_mask = model.energies(sequences, sources, post=post)
    if normalizer == "source":
        # A data row's own negatives: one copy of its source's sequences per row.
        rows = [i for data_source in DATA_SOURCES for i in (sources == data_source).nonzero().flatten().tolist()]
        negative = TokenEnergies(*(tensor[rows] for tensor in negative))
        negative_mask = negative_mask[rows]
        sources = torch.arange(len(DATA)).repeat_interleave(len(rows) // len(DATA))
    return loss_function(
        positive,
        positive_mask,
        negative,
        negative_mask,
        energy_steps=energy_steps,
        normalizer=normalizer,
        sources=sources,
        **settings,
    )


def relative_error(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("normalizer", ["batch", "source"])
@pytest.mark.parametrize("energy_steps", ["all", "last", "post"])
@pytest.mark.parametrize("recent_tokens", [-1, 0, 1, 2])
@pytest.mark.parametrize("baseline", [False, True])
def test_gradient_is_that_of_the_exact_objective(baseline, recent_tokens, energy_steps, normalizer, seed):
    model = TabularModel(seed=seed)
    settings = {"recent_tokens": recent_tokens, "energy_steps": energy_steps, "normalizer": normalizer}
    expected = gradient(exact_objective(model, DATA, DATA_SOURCES, **settings), model)
    got = gradient(estimate(model, baseline=baseline, **settings).loss, model)
    assert relative_error(got, expected) < 1e-12


@pytest.mark.parametrize("normalizer", ["batch", "source"])
@pytest.mark.parametrize("recent_tokens", [-1, 2])
def test_rao_blackwell_has_the_same_expectation(recent_tokens, normalizer):
    model = TabularModel(seed=3)
    settings = {"recent_tokens": recent_tokens, "normalizer": normalizer}
    expected = gradient(exact_objective(model, DATA, DATA_SOURCES, **settings), model)
    got = gradient(estimate(model, rao_blackwell=True, **settings).loss, model)
    assert relative_error(got, expected) < 1e-12


def test_a_logit_shift_of_all_prefixes_has_no_gradient():
    model = TabularModel(seed=1)
    for energy_steps in ("all", "last", "post"):
        grad = gradient(estimate(model, energy_steps=energy_steps).loss, model)
        assert abs(grad.sum().item()) < 1e-10


# Each entry: what goes wrong, where, the line as it is, the line as it would be.
STEPS = "return Steps(past, energies.phi, energies.logsumexp, mask)"
SLIPS = [
    ("history includes its own token", contrast, "range(1, recent_tokens + 1)", "range(0, recent_tokens)"),
    ("first step left out", contrast, STEPS, STEPS.replace("mask)", "mask & (torch.arange(mask.size(1)) > 0))")),
    ("end-of-sentence left out", contrast, STEPS, STEPS.replace("mask)", "mask & F.pad(mask[:, 1:], (0, 1)))")),
    ("phi with the wrong sign", objectives, "masked_sum(data.history + data.phi, found.data_mask)",
     "masked_sum(data.history - data.phi, found.data_mask)"),
    ("negatives' phi with the wrong sign", objectives, "weights * (model.history + model.phi)",
     "weights * (model.history - model.phi)"),
    ("weights of the previous step", objectives, "weights = found.log_weights.exp()",
     "weights = F.pad(found.log_weights[:, :-1], (1, 0)).exp()"),
    ("weights of the next step", objectives, "weights = found.log_weights.exp()",
     "weights = F.pad(found.log_weights[:, 1:], (0, 1), value=0.0).nan_to_num(neginf=0.0).exp()"),
    ("no weights", objectives, "weights = found.log_weights.exp()", "weights = found.log_weights.exp().sign()"),
    ("baseline on the history", objectives, "weights * (model.history + model.phi)",
     "(weights - found.share[found.negative_group]) * model.history + weights * model.phi"),
    ("unmatched counts", contrast, "share = (statistics.data / statistics.negatives.clamp_min(1))",
     "share = (statistics.data.sum() / statistics.negatives.sum()).expand_as(statistics.data)"),
    ("one normaliser for all steps", contrast, "log_weights = log_importance_weights(",
     "log_normalizer = torch.full_like(log_normalizer, model.logsumexp.detach()[model.mask].logsumexp(0) - model.mask.sum().log())"
     "; log_weights = log_importance_weights("),
    ("weights not detached", weights, "logsumexp = logsumexp.detach()", "pass"),
    ("normaliser not divided by the count", weights, "return self.log_sum - self.negatives.clamp_min(1).log()", "return self.log_sum"),
    ("unreached data steps kept", contrast, "data_mask = data.mask & (statistics.negatives > 0)[data_group]",
     "data_mask = data.mask"),
]


@pytest.mark.parametrize("slip, module, line, replacement", SLIPS, ids=[slip[0].replace(" ", "-") for slip in SLIPS])
def test_every_slip_is_caught(slip, module, line, replacement):
    model = TabularModel(seed=0)
    expected = gradient(exact_objective(model, DATA, DATA_SOURCES, recent_tokens=2), model)
    if slip == "unreached data steps kept":
        short = [i for i, sequence in enumerate(DATA) if len(sequence) == 1]
        assert unreached_steps_lose(mutated_loss(module, line, replacement), model, short)
        return
    got = gradient(estimate(model, mutated_loss(module, line, replacement), recent_tokens=2).loss, model)
    assert relative_error(got, expected) > 0.03


def unreached_steps_lose(loss_function, model, short):
    """Whether data steps beyond all negatives still pull on the logits when the negatives are `short` rows of DATA."""
    positive, positive_mask = model.energies(DATA, DATA_SOURCES)
    negative, negative_mask = model.energies([DATA[i] for i in short], DATA_SOURCES[short])
    grad = gradient(loss_function(positive, positive_mask, negative, negative_mask).loss, model)
    beyond = [row for (source, prefix), row in model.row.items() if len(prefix) > 0]
    return grad[beyond].abs().sum() > 0


def test_data_steps_that_no_negative_reaches_are_left_out():
    model = TabularModel()
    assert not unreached_steps_lose(earm_loss, model, [2])
    with_negatives = earm_loss(*model.energies(DATA, DATA_SOURCES), *model.energies([(0,)], [0]))
    assert with_negatives.data_steps == len(DATA)


def test_history_is_a_window_before_the_token():
    nll = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0]])
    mask = torch.tensor([[True, True, True, True, False]])
    assert history(nll, mask, 2).tolist() == [[0, 1, 3, 6, 12]]
    assert history(nll, mask, 0).tolist() == [[0, 0, 0, 0, 0]]
    assert history(nll, mask, -1).tolist() == [[0, 1, 3, 7, 15]]
    assert history(nll, mask, 99).tolist() == [[0, 1, 3, 7, 15]]


def test_control_terms_repeat_each_token_by_its_later_steps():
    model = TabularModel()
    positive, mask = model.energies(DATA, DATA_SOURCES)
    expected = sum(
        positive.nll[i, l]
        for i, sequence in enumerate(DATA)
        for k in range(len(sequence))
        for l in range(max(0, k - 2), k + 1)
    )
    assert nll_terms(positive, mask, recent_tokens=2).item() == pytest.approx(expected.item())
    last_only = sum(positive.nll[i, len(sequence) - 1] for i, sequence in enumerate(DATA)).item()
    assert nll_terms(positive, mask, recent_tokens=0, energy_steps="last").item() == pytest.approx(last_only)


def test_smoothed_history_replaces_the_data_history_only():
    model = TabularModel()
    positive, mask = model.energies(DATA, DATA_SOURCES)
    negative, negative_mask = model.energies(*model.exact_batch())
    plain = earm_loss(positive, mask, negative, negative_mask)
    doubled = earm_loss(positive, mask, negative, negative_mask, positive_history=2 * positive.nll)
    past = history(positive.nll, mask, 2).masked_fill(~mask, 0.0).sum()
    assert (doubled.positive_phase - plain.positive_phase).item() == pytest.approx(past.item())
    assert doubled.negative_phase.item() == plain.negative_phase.item()


def test_padding_changes_nothing():
    model = TabularModel()

    def loss(padding, energy_steps):
        phases = []
        for sequences, sources in ((DATA, DATA_SOURCES), model.exact_batch()):
            energies, mask = model.energies(sequences, sources)
            filler = torch.full((mask.size(0), padding), 1e4, dtype=torch.float64)
            phases.append(TokenEnergies(*(torch.cat([tensor, filler], 1) for tensor in energies)))
            phases.append(torch.nn.functional.pad(mask, (0, padding)))
        return earm_loss(*phases, energy_steps=energy_steps)

    for energy_steps in ("all", "last"):
        plain, wide = loss(0, energy_steps), loss(3, energy_steps)
        assert wide.loss.item() == pytest.approx(plain.loss.item(), abs=1e-9)
        assert relative_error(gradient(wide.loss, model), gradient(plain.loss, model)) < 1e-12


def test_gradcheck_with_weights_held_fixed():
    torch.manual_seed(0)
    mask = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    log_normalizer = torch.randn(3, dtype=torch.float64)
    fixed = torch.randn(3, 3, dtype=torch.float64)

    def loss(target_logit, negative_target_logit):
        positive, negative = TokenEnergies(fixed, target_logit), TokenEnergies(fixed, negative_target_logit)
        return earm_loss(positive, mask, negative, mask, log_normalizer=log_normalizer).loss

    inputs = [torch.randn(3, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(loss, inputs)


def test_half_precision_logits_agree():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 6, 50, generator=generator)
    negative_logits = 3 * torch.randn(4, 6, 50, generator=generator)
    target = torch.randint(50, (4, 6), generator=generator)
    mask = torch.ones(4, 6, dtype=torch.bool)

    def loss(dtype):
        return earm_loss(
            token_energies(logits.to(dtype), target), mask, token_energies(negative_logits.to(dtype), target), mask
        ).loss

    assert loss(torch.float16).dtype == torch.float32
    assert loss(torch.float16).item() == pytest.approx(loss(torch.float32).item(), rel=2e-3)
    assert loss(torch.bfloat16).item() == pytest.approx(loss(torch.float32).item(), rel=2e-2)


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"rao_blackwell": True}, {"recent_tokens": -1}, {"energy_steps": "last"},
        {"energy_steps": "post", "recent_tokens": 0},
        {"baseline": True}, {"baseline": True, "recent_tokens": -1}, {"baseline": True, "energy_steps": "last"},
        {"baseline": True, "energy_steps": "post", "recent_tokens": -1},
    ],
    ids=str,
)
@pytest.mark.parametrize("moving", [False, True])
def test_losses_of_parts_are_the_loss_of_the_whole(settings, moving):
    """Parts of different sizes, lengths and limits, one without a negative, as the batches of several workers."""
    model = TabularModel(seed=2)
    post = settings.get("energy_steps") == "post"
    sequences, sources = model.exact_batch()
    negatives = sequences[::3]
    cuts = [([0, 1, 3, 4, 6, 7], range(len(negatives) - 3)), ([2], range(len(negatives) - 3, len(negatives))), ([5], range(0))]
    normaliser = {"log_normalizer": torch.linspace(0.5, 2.0, 5, dtype=torch.float64)} if moving else {}

    def phases(data_rows, negative_rows):
        data = model.energies([DATA[i] for i in data_rows], DATA_SOURCES[list(data_rows)], post=post)
        own = [negatives[i] for i in negative_rows] or negatives[:1]
        energies, mask = model.energies(own, sources[::3][list(negative_rows) or [0]], post=post)
        return (*data, energies, mask & (len(negative_rows) > 0))

    def limits_of(negative_rows):
        own = [negatives[i] for i in negative_rows] or negatives[:1]
        return {"limits": torch.tensor([len(sequence) + sum(sequence) % 2 for sequence in own])}

    everything = range(len(DATA)), range(len(negatives))
    whole = earm_loss(*phases(*everything), **settings, **normaliser, **limits_of(everything[1]))
    parts, limits = [phases(*cut) for cut in cuts], [limits_of(rows) for _, rows in cuts]
    longest = max(mask.size(1) for part in parts for mask in part[1::2])
    whole_settings = EarmSettings(**settings)
    own = [
        batch_statistics(whole_settings, part[1], Scored(*part[2:]), steps=longest, **limit)
        for part, limit in zip(parts, limits)
    ]
    joint = join_statistics(StepStatistics(*(torch.cat(each) for each in zip(*own))))
    found = [
        earm_loss(*part, **settings, **normaliser, **limit, statistics=joint) for part, limit in zip(parts, limits)
    ]

    loss = sum(each.loss for each in found)
    assert loss.item() == pytest.approx(whole.loss.item(), abs=1e-12)
    assert relative_error(gradient(loss, model), gradient(whole.loss, model)) < 1e-12
    for figure in ("dv", "energy_data", "energy_negatives", "relative_ess", "data_steps"):
        assert sum(getattr(each, figure) for each in found).item() == pytest.approx(getattr(whole, figure).item(), abs=1e-12), figure
    alone = sum(earm_loss(*part, **settings, **normaliser).loss for part in parts)
    assert abs(alone - whole.loss) > 1e-3


# Gradients in half precision are rounded to it, losses and weights are not.
GRADIENT = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 0.0}


@pytest.mark.parametrize("offset", [80.0, -80.0, 10048.0, -10048.0])
@pytest.mark.parametrize("dtype", list(GRADIENT), ids=str)
def test_large_logits_neither_overflow_nor_lose_the_weights(dtype, offset):
    """Logits around one offset, exact in each precision: it must cancel out of weights, effective sample size and gradient."""
    mask, target = torch.ones(4, 3, dtype=torch.bool), torch.zeros(4, 3, dtype=torch.long)
    unit = 64.0 if abs(offset) > 1e3 else 1.0
    logits = offset + unit * torch.randint(-1, 2, (4, 3, 5), generator=torch.Generator().manual_seed(0))
    assert logits.to(dtype).double().equal(logits.double())

    def result(dtype):
        given = logits.to(dtype).requires_grad_()
        loss = earm_loss(token_energies(given.flip(0), target), mask, token_energies(given, target), mask)
        return loss, torch.autograd.grad(loss.loss, given)[0].double()

    (found, gradient_found), (exact, gradient_exact) = result(dtype), result(torch.float64)
    assert found.loss.dtype == found.log_weights.dtype == found.log_normalizer.dtype == torch.float32
    known_to = 1.2e-7 * abs(offset)  # what a logsumexp in float32 can be known to, and a weight relative to itself
    torch.testing.assert_close(found.log_weights.double(), exact.log_weights, rtol=0, atol=known_to)
    assert found.relative_ess.item() == pytest.approx(exact.relative_ess.item(), rel=2 * known_to)
    assert relative_error(gradient_found, gradient_exact) < 2 * known_to + GRADIENT[dtype]
    assert found.loss.item() == pytest.approx(exact.loss.item(), abs=mask.sum().item() * abs(offset) * known_to)


def test_dv_is_the_bound_and_energies_are_means_of_minus_logsumexp():
    model = TabularModel()
    positive, mask = model.energies(DATA, DATA_SOURCES)
    negative, negative_mask = model.energies(*model.exact_batch())
    result = earm_loss(positive, mask, negative, negative_mask)
    expected = energy_of_negatives = 0.0
    for k in range(3):
        alive = negative.logsumexp[negative_mask[:, k], k]
        expected += (positive.logsumexp[mask[:, k], k] - alive.exp().mean().log()).sum().item()
        energy_of_negatives -= (mask[:, k].sum() * alive.mean()).item()
    assert result.dv.item() == pytest.approx(expected)
    assert result.energy_data.item() == pytest.approx(-positive.logsumexp[mask].sum().item())
    assert result.energy_negatives.item() == pytest.approx(energy_of_negatives)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"energy_steps": "first"}, "energy_steps"),
        ({"normalizer": "corpus"}, "normalizer"),
        ({"normalizer": "source"}, "sources"),
        ({"energy_steps": "last", "rao_blackwell": True}, "rao_blackwell"),
        ({"normalizer": "source", "sources": torch.tensor([0]), "log_normalizer": torch.zeros(3)}, "log_normalizer"),
        ({"normalizer": "source", "sources": torch.tensor([0]), "statistics": no_statistics(3)}, "statistics"),
    ],
)
def test_contradictory_settings_are_refused(settings, message):
    model = TabularModel()
    energies, mask = model.energies([(1, 0)], [0])
    with pytest.raises(ValueError, match=message):
        earm_loss(energies, mask, energies, mask, **settings)
