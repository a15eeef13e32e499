"""Two workers' batches are one batch: the same normaliser, the same losses in sum, the same gradient; and no worker is waited for."""
from __future__ import annotations

import math
import multiprocessing
from argparse import Namespace

import pytest
import torch
from fairseq.logging import metrics

from fairseq_earm.criterions import earm_cross_entropy
from fairseq_earm.errors import UsageError
from fairseq_earm.meter_state import MeterState
from tests.criterions.stubs import NEGATIVES, FixedSampler, batch, build
from tests.tiny_model import tiny_model

# The second worker has one row of three, a short one, and negatives longer than the first's.
SHARES = ([0, 1], [2])
MOVING = {"earm_normalizer_ema": 0.75}
FLAGS = {
    "the paper's": {},
    "one token at a time": {"earm_variance_reduction": "none", "earm_recent_tokens": 0},
    "whole history, smoothed": {"earm_recent_tokens": -1, "label_smoothing": 0.1, "earm_smooth_history": True},
    "last step": {"earm_energy_steps": "last", "earm_recent_tokens": 1},
    "one step later": {"earm_energy_steps": "post", "earm_recent_tokens": -1},
    "few rows at a time": {"earm_loss_rows": 2, "ignore_prefix_size": 1},
    "noise": {"earm_control": "noise"},
    "without dropout": {"earm_dropout": "off"},
    "moving": MOVING,
    "moving, last step": {**MOVING, "earm_energy_steps": "last"},
}


def share(model, rows):
    """These rows of the batch, with no more padding than they need, and their negatives."""
    whole = batch(model)
    target = whole["target"][rows]
    length = int(target.ne(model.decoder.dictionary.pad()).sum(1).max())
    net_input = {name: values[rows] for name, values in whole["net_input"].items()}
    net_input["prev_output_tokens"] = net_input["prev_output_tokens"][:, :length]
    negatives = [(sequence, rows.index(source), cut) for sequence, source, cut in NEGATIVES if source in rows]
    ntokens = int(target.ne(model.decoder.dictionary.pad()).sum())
    return {"net_input": net_input, "target": target[:, :length], "ntokens": ntokens, "nsentences": len(rows)}, negatives


class Worker:
    """A worker's model, criterion and share of the batch, at the start of training."""

    def __init__(self, rows, **flags):
        metrics.reset()
        self.model = tiny_model().train()
        self.criterion = build(self.model, **flags)
        self.sample, negatives = share(self.model, rows)
        self.criterion.family.sampler = FixedSampler(self.model, negatives)

    def step(self, update=0, **flags):
        """One training step: loss, gradient, E-ARM's figures and the moving normaliser after it."""
        self.model.zero_grad()
        optimizer = Namespace(scaler=object())
        loss, _, log = self.criterion.task.train_step(self.sample, self.model, self.criterion, optimizer, update, **flags)
        gradient = {name: weight.grad.clone() for name, weight in self.model.named_parameters() if weight.grad is not None}
        return {"loss": loss.item(), "gradient": gradient, "log": log, "moving": MeterState().get("log_normalizer")}

    def learn(self):
        """Other logsumexps than before."""
        with torch.no_grad():
            self.model.decoder.output_projection.weight.mul_(1.5)


def two_steps(rows, **flags):
    worker = Worker(rows, **flags)
    first = worker.step()
    worker.learn()
    return [first, worker.step(1)]


def losing(rows, lose, kind=RuntimeError):
    """A step in which `lose(worker)` makes something fail, and what it raised."""
    worker = Worker(rows, **MOVING)
    lose(worker)
    with pytest.raises(kind) as raised:
        worker.step()
    return {"raised": str(raised.value), "moving": MeterState().get("log_normalizer")}


def out_of_memory(*args, **kwargs):
    raise RuntimeError("CUDA out of memory.")


def broken(*args, **kwargs):
    raise ValueError("something else")


def lose_negatives(worker):
    worker.criterion.family.sampler = out_of_memory


def lose_encoder(worker):
    worker.model.encoder.register_forward_hook(out_of_memory)


def lose_decoder(worker):
    worker.model.decoder.register_forward_hook(broken)


def lose_length(worker):
    def too_long(*args, **kwargs):
        raise UsageError("too long")

    worker.criterion.family.forward = too_long


def lose_once(owner, name):
    """The next call fails, and no other."""
    whole = getattr(owner, name)

    def fail(*args, **kwargs):
        setattr(owner, name, whole)
        out_of_memory()

    setattr(owner, name, fail)


def lose_on_arrival(worker):
    """What comes first once the criterion joins, before there is a collective."""
    lose_once(torch.distributed, "get_backend")


def lose_between(worker):
    """What comes between the two collectives."""
    lose_once(earm_cross_entropy, "batch_statistics")


def skip(rows):
    """A task that leaves its batch out without saying so."""
    worker = Worker(rows, **MOVING)
    worker.criterion.task.train_step(worker.sample, worker.model, lambda *_: (torch.zeros((), requires_grad=True),), Namespace(scaler=object()), 0)
    return {"moving": MeterState().get("log_normalizer")}


def be_dummy(rows):
    """A stand-in whose logsumexps are so far from everyone's that no weight relative to theirs is finite."""
    worker = Worker(rows, **MOVING)
    with torch.no_grad():
        worker.model.decoder.output_projection.weight.mul_(1e4)
    return worker.step(ignore_grad=True)


def be_nan(rows):
    worker = Worker(rows, **MOVING)
    with torch.no_grad():
        worker.model.decoder.output_projection.weight.fill_(math.nan)
    return worker.step()


# What the second worker meets while the first does an ordinary step.
LOSSES = {
    "negatives": lambda rows: losing(rows, lose_negatives),
    "encoder": lambda rows: losing(rows, lose_encoder),
    "decoder": lambda rows: losing(rows, lose_decoder, ValueError),
    "length": lambda rows: losing(rows, lose_length, UsageError),
    "on arrival": lambda rows: losing(rows, lose_on_arrival),
    "between": lambda rows: losing(rows, lose_between),
    "skips": skip,
    "dummy": be_dummy,
}
# What the second does alone: whoever waits for the first would wait for ever.
ALONE = {
    "before the start": {"earm_start_update": 5},
    "λ = 0": {"earm_weight": 0.0},
    "control": {"earm_control": True},
    "nce": {"earm_objective": "nce"},
    "per source": {"earm_normalizer": "source", "earm_negatives": 2},
}


def work(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", world_size=2, rank=rank)
    rows = SHARES[rank]
    Worker(rows).step()  # the process group that fairseq asks for at first
    found = {name: two_steps(rows, **flags) for name, flags in FLAGS.items()}
    for name, lose in LOSSES.items():
        found[name] = lose(rows) if rank else Worker(rows, **MOVING).step()
    found["nan"] = be_nan(rows) if rank else Worker(rows, **MOVING).step()
    found["alone"] = [Worker(rows, **flags).step() for flags in ALONE.values()] if rank else []
    found["evaluation"] = [evaluate(rows)] if rank else []
    found["after all"] = two_steps(rows)
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.barrier()


def evaluate(rows):
    worker = Worker(rows)
    return worker.criterion(worker.model.eval(), worker.sample)[0].item()


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """What each of the two found."""
    folder, context = tmp_path_factory.mktemp("workers"), multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(rank, folder), daemon=True) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(400)
    assert [process.exitcode for process in processes] == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def assert_same_gradient(parts, whole):
    for name, gradient in whole["gradient"].items():
        found = sum(part["gradient"][name] for part in parts)
        assert torch.allclose(found, gradient, rtol=1e-9, atol=1e-11), name


@pytest.mark.parametrize("name", [*FLAGS, "after all"])
def test_two_workers_with_a_part_each_are_one_with_the_whole(workers, name):
    flags = FLAGS.get(name, {})
    for update, whole in enumerate(two_steps([0, 1, 2], **flags)):
        parts = [found[name][update] for found in workers]
        assert sum(part["loss"] for part in parts) == pytest.approx(whole["loss"], rel=1e-10)
        assert_same_gradient(parts, whole)
        for figure in ("earm_loss", "earm_steps", "earm_dv", "earm_ess", "earm_energy_data", "earm_energy_negatives", "earm_negatives"):
            assert sum(part["log"][figure] for part in parts).item() == pytest.approx(whole["log"][figure].item(), rel=1e-9), figure
        if "moving" in name:
            assert all(torch.allclose(part["moving"], whole["moving"], rtol=1e-12) for part in parts)
            assert torch.equal(parts[0]["moving"], parts[1]["moving"])


def test_a_normaliser_of_each_worker_would_be_another(workers):
    alone = sum(two_steps(rows)[0]["loss"] for rows in SHARES)
    assert abs(alone - sum(found["the paper's"][0]["loss"] for found in workers)) > 1e-3


@pytest.mark.parametrize("name", LOSSES)
def test_a_worker_without_a_batch_counts_for_nothing_and_is_not_waited_for(workers, name):
    first, second = (found[name] for found in workers)
    alone = Worker(SHARES[0], **MOVING).step()
    assert first["loss"] == pytest.approx(alone["loss"], rel=1e-12)
    assert_same_gradient([first], alone)
    # It hears what the others' moving normaliser is all the same.
    assert torch.equal(first["moving"], second["moving"]) and torch.allclose(first["moving"], alone["moving"], rtol=1e-12)


def test_an_error_stays_the_worker_s_own(workers):
    raised = [workers[1][name]["raised"] for name in ("decoder", "length", "negatives", "encoder", "on arrival", "between")]
    assert raised == ["something else", "fairseq-earm: error: too long"] + ["CUDA out of memory."] * 4


def test_a_dummy_batch_has_a_gradient_of_zeros(workers):
    gradient = workers[1]["dummy"]["gradient"]
    assert gradient and all(torch.equal(each, torch.zeros_like(each)) for each in gradient.values())


def test_one_worker_s_nan_is_everyone_s_and_does_not_move_the_normaliser(workers):
    """The gradient's sum over workers is no number then: all skip the update."""
    assert all(math.isnan(found["nan"]["loss"]) and found["nan"]["moving"] is None for found in workers)


def test_where_nothing_is_shared_nobody_is_waited_for(workers):
    assert len(workers[1]["alone"]) == len(ALONE) and all(math.isfinite(step["loss"]) for step in workers[1]["alone"])
    assert math.isfinite(workers[1]["evaluation"][0])
