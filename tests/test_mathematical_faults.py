"""What training makes of degenerate negatives, concentrated weights, huge logits and numbers that are none: a loss and a
gradient that are right or skipped, and a figure of the log that shows it."""
from __future__ import annotations

import math

import pytest
import torch
from fairseq.logging import metrics

from fairseq_earm.criterions.residual_nce import ResidualNceCriterion
from fairseq_earm.ebm.earm import earm_loss
from fairseq_earm.ebm.energy import TokenEnergies, token_energies
from fairseq_earm.ebm.loss_head import projected_statistics, token_statistics
from fairseq_earm.ebm.marginal import next_token
from fairseq_earm.ebm.nce import residual_nce_loss
from fairseq_earm.ebm.partition import log_partition
from fairseq_earm.ebm.weights import effective_sample_size, resample
from fairseq_earm.meter_state import MeterState
from fairseq_earm.sampling.samples import Samples
from tests.criterions.test_residual_nce import Network, Task, batch, config
from tests.families import FAMILIES

SETTINGS = [{}, {"earm_energy_steps": "last", "earm_recent_tokens": 0}, {"earm_normalizer_ema": 0.9}]
TEXT = ["encoder-decoder", "language model", "transformer_xl"]


@pytest.fixture(autouse=True)
def no_metrics():
    metrics.reset()
    yield
    metrics.reset()


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param](rounded=False)


def negatives(family, rows, truncated=False) -> Samples:
    """The given sequences of tokens as negatives, equally many for each row of the batch."""
    pad, width = family.dictionary.pad(), max(1, *map(len, rows))
    tokens = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
    alive = torch.arange(width) < torch.tensor([[len(row)] for row in rows])
    sources = torch.arange(len(rows)) // (len(rows) // len(family.data))
    return Samples(tokens, alive, torch.zeros(tokens.shape), torch.full((len(rows),), truncated), sources)


class Outcome:
    """Loss, gradient and log of one batch with known negatives, all of E-ARM's figures as they are printed."""

    def __init__(self, family, samples, **flags):
        criterion = family.criterion(earm_weight=0.5, **flags)
        criterion.family.draw = lambda *unused: samples
        family.model.zero_grad()
        loss, self.size, self.outputs = criterion(family.model, family.sample)
        loss.backward()
        self.loss = loss.item()
        found = [weight.grad.flatten() for weight in family.model.parameters() if weight.grad is not None]
        self.gradient = torch.cat(found)
        with metrics.aggregate(new_root=True) as logged:
            criterion.reduce_metrics([self.outputs])
        self.log = logged.get_smoothed_values()

    @property
    def is_sound(self):
        figures = [value for key, value in self.log.items() if key.startswith("earm_")]
        return math.isfinite(self.loss) and bool(self.gradient.isfinite().all()) and all(map(math.isfinite, figures))


def words(family):
    """Two tokens of which none ends a sequence."""
    return sorted({token for row in family.data for token in row})[-2:]


def whole(family):
    """A sequence of as many tokens as negatives have, without an end."""
    return words(family)[-1:] * family.network.length


@pytest.mark.parametrize("flags", SETTINGS, ids=str)
@pytest.mark.parametrize("name", TEXT)
def test_negatives_that_are_all_empty(name, flags):
    """End-of-sentence alone: one step, at which all are alike but for their sources."""
    family = FAMILIES[name](rounded=False)
    found = Outcome(family, negatives(family, [[family.dictionary.eos()]] * 3), **flags)
    assert found.is_sound and found.gradient.any()
    assert found.log["earm_negative_length"] == 1 and found.log["earm_truncated"] == 0
    # Later steps of the data have nothing to be held against.
    assert found.outputs["earm_steps"] == len(family.data)


@pytest.mark.parametrize("flags", SETTINGS, ids=str)
@pytest.mark.parametrize("name", TEXT)
def test_no_negative_reaches_a_step(name, flags):
    """As where sentences end before their negatives begin: cross-entropy alone."""
    family = FAMILIES[name](rounded=False)
    found = Outcome(family, negatives(family, [[]] * 3), **flags)
    stock = family.criterion(earm_weight=0.0)(family.model, family.sample)[0]
    assert found.is_sound and found.loss == pytest.approx(stock.item(), rel=1e-6)
    assert found.outputs["earm_steps"] == 0 and found.log["earm_negative_length"] == 0


@pytest.mark.parametrize("flags", SETTINGS, ids=str)
def test_negatives_that_are_all_truncated(family, flags):
    found = Outcome(family, negatives(family, [whole(family)] * len(family.data), truncated=True), **flags)
    assert found.is_sound
    assert found.log["earm_truncated"] == 1 and found.log["earm_negative_length"] == family.network.length


def test_negatives_that_are_all_identical(family):
    """Of one source they weigh the same, whatever they are, and count as one that stands there alone."""
    rows = len(family.data)
    many = Outcome(family, negatives(family, [whole(family)] * 4 * rows), earm_negatives=4)
    one = Outcome(family, negatives(family, [whole(family)] * rows))
    assert many.is_sound and many.loss == pytest.approx(one.loss, rel=1e-12)
    assert torch.allclose(many.gradient, one.gradient, rtol=1e-9, atol=1e-12)
    assert many.log["earm_distinct"] == round(1 / (4 * rows), 4)
    if "source" in family.normalizers:
        found = Outcome(family, negatives(family, [whole(family)] * 4 * rows), earm_negatives=4, earm_normalizer="source")
        assert found.log["earm_ess"] == 1 and found.log["earm_max_weight"] == 1


@pytest.mark.parametrize("flags", SETTINGS, ids=str)
@pytest.mark.parametrize("name", TEXT)
def test_negatives_of_one_token(name, flags):
    family = FAMILIES[name](rounded=False)
    found = Outcome(family, negatives(family, [whole(family)[:1]] * len(family.data), truncated=True), **flags)
    assert found.is_sound and found.log["earm_negative_length"] == 1 and found.log["earm_truncated"] == 1


@pytest.mark.parametrize("flags", [{}, {"earm_variance_reduction": "none"}, {"earm_energy_steps": "last"}], ids=str)
def test_a_batch_of_one_sentence(flags):
    """Its one negative weighs 1, and the loss is the difference of the two phases, as for any batch."""
    family = FAMILIES["encoder-decoder"](rounded=False)
    one = {key: value[:1] for key, value in family.sample["net_input"].items()}
    sample = {**family.sample, "net_input": one, "target": family.sample["target"][:1], "ntokens": 3, "nsentences": 1}
    family = family._replace(sample=sample, data=family.data[:1])
    found = Outcome(family, negatives(family, [whole(family)]), **flags)
    assert found.is_sound and found.log["earm_ess"] == 1 and found.log["earm_max_weight"] == 1


def random_energies(rows, steps, scale=1.0, dtype=torch.float64):
    torch.manual_seed(rows)
    logits = (scale * torch.randn(rows, steps, 5, dtype=torch.float64)).to(dtype).requires_grad_()
    return logits, token_energies(logits, torch.randint(5, (rows, steps)))


def test_weights_that_concentrate_on_one_negative():
    """All of the weight is one row's, which then counts as often as there are rows."""
    data_logits, data = random_energies(3, 4)
    logits, model = random_energies(8, 4)
    shift = torch.zeros(8, 1, dtype=torch.float64)
    shift[5] = 1e4
    model = TokenEnergies(model.logsumexp + shift, model.target_logit + shift)
    everywhere = [torch.ones(rows, 4, dtype=torch.bool) for rows in (3, 8)]
    found = earm_loss(data, everywhere[0], model, everywhere[1])
    found.loss.backward()
    assert found.loss.isfinite() and logits.grad.isfinite().all()
    assert found.log_weights.exp()[5].tolist() == pytest.approx([8.0] * 4)
    assert (found.relative_ess / found.data_steps).item() == pytest.approx(1 / 8)
    assert not logits.grad[[0, 1, 2, 3, 4, 6, 7]].any() and logits.grad[5].any()
    alone = earm_loss(data, everywhere[0], TokenEnergies(*(each[5:6] for each in model)), everywhere[1][:1])
    assert found.loss.item() == pytest.approx(alone.loss.item(), rel=1e-12)


def scaled(family, largest):
    """The family's model with logits of up to ±largest."""
    output = family.model(**family.sample["net_input"])[0].detach()
    factor = largest / output.abs().max().item()
    family.model.decoder.register_forward_hook(lambda module, inputs, output: (output[0] * factor, *output[1:]))
    return family


@pytest.mark.parametrize("flags", SETTINGS, ids=str)
def test_huge_logits(family, flags):
    """A softmax that knows but one token: energies are as large as the logits, weights are one row's, nothing overflows."""
    rows = len(family.data)
    samples = negatives(family, [whole(family), whole(family)[:-1] + words(family)[:1]] * rows)
    found = Outcome(scaled(family, 1e4), samples, earm_negatives=2, **flags)
    assert found.is_sound
    assert abs(found.log["earm_energy_negatives"]) > 1e2 and 1 / (2 * rows) - 1e-3 <= found.log["earm_ess"] <= 1


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("largest", [80.0, 1e4])
def test_the_loss_head_takes_huge_logits(dtype, tolerance, largest):
    """From logits and from states: what float64 says of the same numbers, gradient included."""
    tolerance = max(tolerance, 2e-7 * largest)  # a logit of 10⁴ has but three decimals in float32
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 4, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    hidden *= largest / (hidden @ weight.t()).abs().max()
    target, upstream = torch.randint(7, (6,)), torch.randn(3, 6, dtype=torch.float64)

    def read(logits, kind):
        logits = logits.detach().to(kind).requires_grad_()
        found = token_statistics(logits, target)
        gradient = torch.autograd.grad(sum((u.to(f) * f).sum() for u, f in zip(upstream, found)), logits)[0]
        return [*found, gradient]

    logits = (hidden @ weight.t()).to(dtype)
    for got, expected in zip(read(logits, dtype), read(logits, torch.float64)):
        assert torch.isfinite(got).all()
        assert torch.allclose(got.double(), expected, rtol=tolerance, atol=tolerance)
    if dtype == torch.float32:
        states, vocabulary = hidden.float().requires_grad_(), weight.float().requires_grad_()
        found = projected_statistics(states, vocabulary, target, rows=4)
        sum(each.sum() for each in found).backward()
        assert all(torch.isfinite(each).all() for each in (*found, states.grad, vocabulary.grad))
        exact = hidden @ weight.t()
        assert torch.allclose(found.logsumexp.double(), exact.logsumexp(-1), rtol=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("part", ["data", "negatives"])
def test_one_sentence_without_numbers(family, part, value):
    """The gradient shows it, so that the update is skipped; the log and the moving normaliser are spared."""
    samples = negatives(family, [whole(family)] * len(family.data))
    good = Outcome(family, samples, earm_normalizer_ema=0.9)
    moving = MeterState().get("log_normalizer").clone()
    calls = []

    def spoil(module, inputs, output):
        calls.append(None)
        logits = output[0].clone()
        if len(calls) == (1 if part == "data" else 2):
            logits[0] = logits[0] + value
        return (logits, *output[1:])

    family.model.decoder.register_forward_hook(spoil)
    found = Outcome(family, samples, earm_normalizer_ema=0.9)
    assert good.is_sound and len(calls) == 2
    assert not math.isfinite(found.loss) and not found.gradient.isfinite().all()
    assert found.outputs["sample_size"] == 0 and found.outputs["earm_batches"] == 0
    assert all(math.isfinite(float(figure)) for figure in found.outputs.values())
    assert MeterState().get("log_normalizer").isfinite().all()
    if part == "negatives" and value != -math.inf:  # a row of no weight leaves the others' mean
        assert torch.equal(MeterState().get("log_normalizer"), moving)


def test_a_moving_normaliser_shows_a_leap():
    """After energies that leapt, and fell back, weights relative to the average are nothing, for as long as it remembers."""
    family = FAMILIES["encoder-decoder"](rounded=False)
    samples = negatives(family, [whole(family)] * 3)
    before = Outcome(family, samples, earm_normalizer_ema=0.9)
    MeterState().set("log_normalizer", MeterState().get("log_normalizer") + 50.0)
    after = Outcome(family, samples, earm_normalizer_ema=0.9)
    assert after.is_sound and before.log["earm_max_weight"] >= 1 and after.log["earm_max_weight"] == 0
    assert after.log["earm_dv"] < -40 and after.log["earm_log_normalizer"] > before.log["earm_log_normalizer"] + 40


ENERGIES = [0.0, 0.0, 0.7, 1e4, -1e4]


def noise_contrast(energies, data, noise):
    """Loss, gradient and log of one batch of sequences with known energies, one negative for each of the data."""
    task, network = Task(torch.tensor(noise)), Network(energies)
    criterion = ResidualNceCriterion(task, config())
    loss, _, log = criterion(network, batch(*data))
    loss.backward()
    with metrics.aggregate(new_root=True) as logged:
        criterion.reduce_metrics([log])
    return loss.item(), network.energies.grad, logged.get_smoothed_values()


def test_noise_that_is_all_the_same():
    """The data's own sequence at that: nothing is learnt of it but E = 0, and the log shows no gap."""
    loss, gradient, log = noise_contrast(ENERGIES, [[2]] * 3, [[2]] * 3)
    assert loss == pytest.approx(3 * (math.log1p(math.exp(0.7)) + math.log1p(math.exp(-0.7))))
    assert gradient[2] > 0 and log["nce_energy_gap"] == 0
    assert log["nce_accuracy_data"] + log["nce_accuracy_negatives"] == 1


@pytest.mark.parametrize("data, noise, expected", [([[4]], [[3]], 0.0), ([[3]], [[4]], 2e4)], ids=["right", "wrong"])
def test_huge_residual_energies(data, noise, expected):
    loss, gradient, log = noise_contrast(ENERGIES, data, noise)
    assert loss == pytest.approx(expected, abs=1e-3) and gradient.isfinite().all()
    assert all(math.isfinite(value) for value in log.values())
    assert log["nce_energy_gap"] == (2e4 if expected == 0 else -2e4)
    assert log["nce_self_normalisation"] == (0 if expected == 0 else pytest.approx(math.exp(600), rel=1e-9))


def test_no_noise_at_all():
    data = torch.tensor([0.3, -0.2], requires_grad=True)
    loss = residual_nce_loss(data, torch.zeros(0))
    loss.backward()
    assert loss.isfinite() and data.grad.isfinite().all()


@pytest.mark.parametrize("values", [[1e4, 0.0, 0.0, 0.0], [1e4, -1e4], [-1e4] * 5, [1e4] * 5, [1e4]], ids=str)
def test_bounds_of_the_partition_function(values):
    """One sample that carries the sum: the lower bound is its own, and the upper one so far above that no one trusts it."""
    n, bounds = len(values), log_partition(torch.tensor(values))
    lower = torch.tensor(values, dtype=torch.float64).logsumexp(0).item() - math.log(n)
    assert bounds.lower.item() == pytest.approx(lower, rel=1e-12) and math.isfinite(bounds.upper.item())
    if len(set(values)) == 1:
        assert bounds.upper.item() == pytest.approx(values[0], rel=1e-9)
    else:
        assert bounds.upper.item() - bounds.lower.item() > 5e3
        assert effective_sample_size(torch.tensor(values, dtype=torch.float64)).item() == 1


def test_candidates_without_any_weight():
    """All of them are returned, once each, in whatever order; one with a weight comes first."""
    nothing = torch.full((3, 6), -math.inf)
    assert resample(nothing).sort(-1).values.tolist() == [list(range(6))] * 3
    nothing[:, 4] = -1e4
    assert resample(nothing)[:, 0].tolist() == [4] * 3


def test_a_next_token_with_one_dominant_completion():
    found = next_token(torch.tensor([-1.0, -1.0]), torch.tensor([[1e4, -1e4], [0.0, 0.0]]))
    assert found.probability.tolist() == [1.0, 0.0] and found.standard_error.isfinite().all()
