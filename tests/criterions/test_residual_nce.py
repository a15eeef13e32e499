"""Residual NCE through the criterion: its loss, its log, and that it finds a known energy."""
import math
from argparse import Namespace

import pytest
import torch
from fairseq.logging import metrics
from fairseq.tasks import FairseqTask

from fairseq_earm.criterions.residual_nce import ResidualNceCriterion
from fairseq_earm.errors import UsageError
from fairseq_earm.sampling.continuation import ContinuationSampler
from fairseq_earm.sampling.frozen import FrozenModel
from fairseq_earm.tasks.negatives import OnlineContinuations
from fairseq_earm.tasks.residual_language_modeling import ResidualLanguageModelingTask
from tests.tiny_language import enumerate_continuations, tiny_language_model

PAD = 1


class Task(FairseqTask):
    """Data and negatives that are known in advance."""

    energy_pad = PAD
    target_dictionary = None

    def __init__(self, negatives=None):
        self.given = negatives
        self.prepared = []

    def prepare_negatives(self, count):
        self.prepared.append(count)

    def sequences(self, sample):
        return sample["tokens"]

    def negatives(self, sample, count, *, training):
        self.training = training
        return self.given


class Network(torch.nn.Module):
    """The energy of a sequence is that of its first token; remembers what it was asked for."""

    def __init__(self, energies):
        super().__init__()
        self.energies = torch.nn.Parameter(torch.tensor(energies))
        self.seen = []

    def forward(self, src_tokens):
        self.seen.append(src_tokens)
        return self.energies[src_tokens[:, 0]]

    def set_num_updates(self, number):
        pass


def config(**flags):
    return Namespace(**{"nce_negatives_per_positive": 1, "label_smoothing": 0.0, "fp16": False, "amp": False, **flags})


def batch(*rows):
    tokens = torch.tensor(rows)
    return {"tokens": tokens, "ntokens": tokens.numel(), "nsentences": len(rows), "id": torch.arange(len(rows))}


ENERGIES = [0.0, 0.0, 0.5, -1.5, 2.0, -0.3]
DATA, NEGATIVES = [[2, 5], [3, 5]], [[4, 5, 5], [2, 5, PAD], [3, PAD, PAD], [5, 5, 5]]


def setting(**flags):
    task, network = Task(torch.tensor(NEGATIVES)), Network(ENERGIES)
    criterion = ResidualNceCriterion(task, config(nce_negatives_per_positive=2, **flags))
    return task, network, criterion


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_equation_3_with_the_log_ratio(smoothing):
    task, network, criterion = setting(label_smoothing=smoothing)
    loss, size, log = criterion(network, batch(*DATA))

    def cost(energy, label):
        logit = -energy - math.log(2)
        right, wrong = (math.log1p(math.exp(-sign * logit)) for sign in ((1, -1) if label else (-1, 1)))
        return (1 - smoothing) * right + smoothing * wrong

    expected = sum(cost(ENERGIES[row[0]], 1) for row in DATA) + sum(cost(ENERGIES[row[0]], 0) for row in NEGATIVES)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert size == 2 and log["loss"].item() == pytest.approx(expected, rel=1e-5)
    assert task.prepared == [2]


def test_data_and_negatives_go_through_the_network_together():
    task, network, criterion = setting()
    criterion(network, batch(*DATA))
    [seen] = network.seen
    assert seen.tolist() == [[2, 5, PAD], [3, 5, PAD], *NEGATIVES]
    assert task.training
    task.given = task.given[:, :1]
    criterion(network.eval(), batch(*DATA))
    assert network.seen[1].tolist() == [*DATA, [4, PAD], [2, PAD], [3, PAD], [5, PAD]]
    assert not task.training


def test_log_is_of_all_batches_and_workers():
    logs = []
    for rows, negatives in ((DATA, NEGATIVES), ([[5, 4]], [[3, 5], [5, 5]])):
        task, network, criterion = setting()
        task.given = torch.tensor(negatives)
        logs.append(criterion(network, batch(*rows))[2])
    assert criterion.logging_outputs_can_be_summed()
    assert len({tuple(log) for log in logs}) == 1
    summed = [{key: sum(log[key] for log in logs) for key in logs[0]}]
    found = []
    for outputs in (logs, summed):
        with metrics.aggregate(new_root=True) as aggregator:
            ResidualNceCriterion.reduce_metrics(outputs)
        found.append(aggregator.get_smoothed_values())
    assert found[0] == found[1]
    data = [ENERGIES[row[0]] for row in [*DATA, [5]]]
    negatives = [ENERGIES[row[0]] for row in [*NEGATIVES, [3], [5]]]
    boundary = -math.log(2)  # twice as many negatives: a sequence with E = 0 is rather one of them
    gap = sum(negatives) / 6 - sum(data) / 3
    assert found[0] == {
        "loss": pytest.approx(sum(float(log["loss"]) for log in logs) / 3 / math.log(2), abs=1e-3),
        "nce_accuracy_data": pytest.approx(sum(e < boundary for e in data) / 3, abs=1e-4),
        "nce_accuracy_negatives": pytest.approx(sum(e >= boundary for e in negatives) / 6, abs=1e-4),
        "nce_energy_data": pytest.approx(sum(data) / 3, abs=1e-3),
        "nce_energy_negatives": pytest.approx(sum(negatives) / 6, abs=1e-3),
        "nce_energy_gap": pytest.approx(gap, abs=1e-4),
        "nce_self_normalisation": pytest.approx(sum(math.exp(-e) for e in negatives) / 6, abs=1e-3),
    }


def test_sums_are_taken_on_the_device_of_the_log(monkeypatch):
    """On a GPU the sample size is a plain number beside tensors that are elsewhere."""
    task, network, criterion = setting()
    log = criterion(network, batch(*DATA))[2]
    away = {key: value.to("meta") if torch.is_tensor(value) else value for key, value in log.items()}
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: [1.0] * len(tensor))
    with metrics.aggregate(new_root=True) as aggregator:
        ResidualNceCriterion.reduce_metrics([away, away])
    assert aggregator.get_smoothed_values()["nce_energy_data"] == 0.25


def test_log_stays_finite_where_weights_overflow():
    task, network, criterion = setting()
    with torch.no_grad():
        network.energies[2] = -1e5
    log = criterion(network, batch(*DATA))[2]
    with metrics.aggregate(new_root=True) as aggregator:
        ResidualNceCriterion.reduce_metrics([log] * 1000)
    assert all(math.isfinite(value) for value in aggregator.get_smoothed_values().values())
    assert aggregator.get_smoothed_values()["nce_self_normalisation"] > 1e200


def test_workers_without_data_add_nothing():
    """What a worker does for want of data: its gradient is zero, and its log adds up to nothing."""
    task, network, criterion = setting()
    loss = task.train_step(batch(*DATA), network, criterion, Namespace(backward=lambda loss: loss.backward()), 0, True)[0]
    assert loss.item() == 0 and not network.energies.grad.any()
    log = {key: 0 for key in criterion(network, batch(*DATA))[2]}
    with metrics.aggregate(new_root=True) as aggregator:
        ResidualNceCriterion.reduce_metrics([log])
    assert "nce_energy_gap" not in aggregator.get_smoothed_values()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("token", [3, 4], ids=["data", "negatives"])
def test_energies_that_are_not_finite_end_training(value, token):
    task, network, criterion = setting()
    task.given = torch.tensor([[4, 5]] * 4)
    with torch.no_grad():
        network.energies[token] = value
    bad = {3: 1, 4: 4}[token]
    with pytest.raises(UsageError, match=f"{bad} of 6 energies are not finite, .* --lr"):
        criterion(network, batch(*DATA))
    # In half precision fairseq skips the batch, and knows it by its loss.
    for flag in ("fp16", "amp"):
        scaled = ResidualNceCriterion(task, config(nce_negatives_per_positive=2, **{flag: True}))
        assert not scaled(network, batch(*DATA))[0].isfinite()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_of_several_workers_all_end_by_the_gradient_they_share(monkeypatch, value):
    monkeypatch.setattr("fairseq_earm.criterions.residual_nce.get_data_parallel_world_size", lambda: 2)
    task, network, criterion = setting()
    with torch.no_grad():
        network.energies[3] = value
    norms = [torch.tensor(1.0), torch.tensor(math.nan)]
    optimizer = Namespace(backward=lambda loss: loss.backward(), clip_grad_norm=lambda limit: norms.pop(0))
    for _ in range(2):
        loss = task.train_step(batch(*DATA), network, criterion, optimizer, 0)[0]
    assert loss.isnan() and network.energies.grad.isnan().any()
    assert optimizer.clip_grad_norm(1.0) == 1 and len(norms) == 1  # put in place once, not once a step
    with pytest.raises(UsageError, match="gradient of all workers together is not finite, training has diverged; lower --lr"):
        optimizer.clip_grad_norm(1.0)
    with pytest.raises(UsageError, match="2 of 6 energies"):
        criterion(network.eval(), batch(*DATA))


@pytest.mark.parametrize("flag, value", [
    ("nce_negatives_per_positive", 0), ("label_smoothing", -0.1), ("label_smoothing", 0.5), ("label_smoothing", math.nan),
])
def test_settings_out_of_range(flag, value):
    with pytest.raises(UsageError, match=f"--{flag.replace('_', '-')} {value}: give"):
        ResidualNceCriterion(Task(), config(**{flag: value}))


def test_other_tasks_have_no_base():
    with pytest.raises(UsageError, match="use --task residual_language_modeling or residual_translation"):
        ResidualNceCriterion(Namespace(target_dictionary=None), config())


class World(ResidualLanguageModelingTask):
    """The real task on a base model that can be enumerated, and data with a known residual energy."""

    def __init__(self, model, energy):
        dictionary, self.model = model.decoder.dictionary, model
        flags = {"negatives_temperature": 1.0, "negatives_topk": -1, "negatives_topp": -1.0, "negatives": "online"}
        super().__init__(Namespace(prefix_length=1, sequence_length=3, energy_path=None, **flags), dictionary)
        # Every continuation of every prefix, its log-probability under the base and its energy: (prefixes, continuations).
        prefixes = [[dictionary.index("w0")], [dictionary.eos()]]
        found = [enumerate_continuations(model, torch.tensor(prefix), 2) for prefix in prefixes]
        self.tokens = torch.tensor([[prefix + list(rest) for rest in found[i]] for i, prefix in enumerate(prefixes)])
        self.log_base = torch.tensor([list(each.values()) for each in found])
        drawn = energy * torch.randn(self.log_base.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        # P_LM · exp(−E) is normalised.
        self.energy = drawn + (self.log_base - drawn).logsumexp(1, keepdim=True)
        self.log_data = self.log_base - self.energy

    def _online(self):
        return OnlineContinuations(FrozenModel(self.model, None), ContinuationSampler(self.dictionary, 2))

    def data(self, size, number):
        """A batch of `size` sequences of each prefix."""
        rows = torch.multinomial(self.log_data.exp(), size, True, generator=torch.Generator().manual_seed(number))
        tokens = torch.cat([self.tokens[i][rows[i]] for i in range(len(rows))])
        return {"net_input": {"src_tokens": tokens}, "id": torch.arange(len(tokens)), "ntokens": tokens.numel()}


class Table(torch.nn.Module):
    """An energy for every sequence."""

    def __init__(self, symbols):
        super().__init__()
        self.energies = torch.nn.Parameter(torch.zeros(symbols, symbols, symbols, dtype=torch.float64))

    def forward(self, src_tokens):
        return self.energies[tuple(src_tokens.T)]


@pytest.mark.parametrize("count", [1, 4])
def test_nce_finds_the_known_energy(count):
    model = tiny_language_model(words=1)
    with torch.no_grad():
        model.decoder.output_projection.weight.mul_(0.25)  # so that no continuation hardly ever occurs
    world = World(model, energy=1.0)
    criterion = ResidualNceCriterion(world, config(nce_negatives_per_positive=count))
    table, steps = Table(len(world.dictionary)), 150
    optimizer = torch.optim.Adam(table.parameters(), lr=0.1, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss, size, _ = criterion(table, world.data(200, step))
        (loss / size).backward()
        optimizer.step()
        schedule.step()
    learnt = table(world.tokens.flatten(0, 1)).view(world.log_base.shape).detach()
    # Averaged over data and samples: what is rare is hardly learnt.
    share = (world.log_base.exp() + world.log_data.exp()) / 2
    error, spread = ((share * (learnt - energy) ** 2).sum(1).sqrt() for energy in (world.energy, 0.0))
    assert (spread > 0.5).all() and (error < 0.12).all()
    assert (world.log_base - learnt).logsumexp(1).exp().tolist() == pytest.approx([1, 1], abs=0.03)
    # The joint model is far closer to the data than its base.
    joint = (world.log_base - learnt).log_softmax(1)
    gain, best = ((world.log_data.exp() * (log_p - world.log_base)).sum(1) for log_p in (joint, world.log_data))
    assert (gain > 0.97 * best).all()
