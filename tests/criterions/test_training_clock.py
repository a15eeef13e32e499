"""State that lasts from update to update: moving normaliser, λ's schedule, skipped updates."""
from __future__ import annotations

import math
from argparse import Namespace

import pytest
import torch
from fairseq.logging import metrics

from fairseq_earm.criterions.training_clock import MAX_SKIPPED_IN_A_ROW
from fairseq_earm.meter_state import MeterState
from tests.criterions.stubs import NEGATIVES, FixedSampler, batch, build
from tests.tiny_model import tiny_model


@pytest.mark.parametrize("energy_steps", ["all", "last"])
def test_moving_normaliser_averages_over_updates(energy_steps):
    model = tiny_model().train()
    criterion = build(model, earm_normalizer_ema=0.75, earm_energy_steps=energy_steps)
    criterion.family.sampler = FixedSampler(model, NEGATIVES)
    criterion(model, batch(model))
    first = MeterState().get("log_normalizer")
    assert first.numel() == (4 if energy_steps == "all" else 1)
    with torch.no_grad():
        model.decoder.output_projection.weight.mul_(1.5)
    criterion(model, batch(model))
    moved = MeterState().get("log_normalizer")
    plain = build(model, earm_normalizer_ema=0.75, earm_energy_steps=energy_steps)
    plain.family.sampler = criterion.family.sampler
    metrics.reset()
    plain(model, batch(model))
    batch_only = MeterState().get("log_normalizer")
    assert torch.allclose(moved.exp(), 0.75 * first.exp() + 0.25 * batch_only.exp())
    assert not torch.allclose(moved, batch_only)


def test_a_moving_normaliser_of_other_energy_steps_is_left_behind_with_a_warning(caplog):
    model, sampler = tiny_model().train(), FixedSampler(tiny_model(), NEGATIVES)
    for steps in ("all", "last", "last"):
        criterion = build(model, earm_normalizer_ema=0.75, earm_energy_steps=steps)
        criterion.family.sampler = sampler
        criterion(model, batch(model))
    said = [record.message for record in caplog.records if "moving normaliser" in record.message]
    assert said == [
        "--earm-energy-steps last: the checkpoint's moving normaliser is one of --earm-energy-steps all; it starts anew"
    ]
    assert MeterState().get("log_normalizer").numel() == 1


def run_updates(criterion, model, updates, epoch=1):
    """λ of each update, the way fairseq's trainer would drive the task."""
    seen = []
    criterion.task.begin_epoch(epoch, model)
    optimizer = Namespace(scaler=object())
    for update in updates:
        criterion.task.train_step(batch(model), model, lambda *_: (torch.zeros((), requires_grad=True),), optimizer, update)
        seen.append(criterion.schedule.current_weight())
    return seen


def test_weight_starts_and_warms_up():
    model = tiny_model()
    by_update = build(model, earm_weight=2.0, earm_start_update=3, earm_warmup_updates=4)
    assert run_updates(by_update, model, range(8)) == [0, 0, 0, 0.5, 1.0, 1.5, 2.0, 2.0]
    by_epoch = build(model, earm_weight=2.0, earm_start_epoch=2, earm_warmup_updates=4)
    assert run_updates(by_epoch, model, range(5)) == [0] * 5
    assert run_updates(by_epoch, model, range(5, 10), epoch=2) == [0.5, 1.0, 1.5, 2.0, 2.0]
    resumed = build(model, earm_weight=2.0, earm_start_epoch=2, earm_warmup_updates=4)
    assert run_updates(resumed, model, range(7, 9), epoch=2) == [1.5, 2.0]


def test_warm_up_begins_anew_where_updates_or_epochs_do():
    model = tiny_model()
    earlier = build(model, earm_weight=2.0, earm_start_epoch=2, earm_warmup_updates=4)
    assert run_updates(earlier, model, range(20, 22), epoch=2) == [0.5, 1.0]
    updates_anew = build(model, earm_weight=2.0, earm_start_epoch=2, earm_warmup_updates=4)  # --reset-optimizer
    assert run_updates(updates_anew, model, range(6), epoch=3) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    MeterState().set("first_update", 7)
    both_anew = build(model, earm_weight=2.0, earm_start_epoch=2, earm_warmup_updates=4)
    assert run_updates(both_anew, model, range(9)) == [0] * 9
    assert run_updates(both_anew, model, range(9, 11), epoch=2) == [0.5, 1.0]


class Optimizer:
    """A fairseq optimizer in float32, as far as the guard sees it."""

    scaler = None

    def __init__(self, model):
        self.parameters = list(model.parameters())

    def zero_grad(self):
        for parameter in self.parameters:
            parameter.grad = None

    def clip_grad_norm(self, max_norm, aggregate_norm_fn=None):
        return torch.nn.utils.clip_grad_norm_(self.parameters, max_norm)


def one_update(criterion, model, optimizer, update):
    """Gradient norm of one update, and its log, in the order of fairseq's trainer."""
    _, _, log = criterion.task.train_step(batch(model), model, criterion, optimizer, update_num=update)
    norm = optimizer.clip_grad_norm(1.0)
    criterion.task.optimizer_step(optimizer, model=model, update_num=update)
    return norm, log


def test_updates_that_are_not_finite_are_skipped_counted_and_kept_out_of_the_log():
    model = tiny_model().train()
    criterion = build(model)
    criterion.family.sampler = FixedSampler(model, NEGATIVES)
    optimizer = Optimizer(model)
    weight = model.decoder.output_projection.weight
    norm, _ = one_update(criterion, model, optimizer, 0)
    assert norm > 0 and criterion.task.stepped == 1
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(math.inf)
    norm, log = one_update(criterion, model, optimizer, 1)
    assert norm == 0 and criterion.task.stepped == 1 and all(p.grad is None for p in model.parameters())
    assert log["loss"] == 0 and log["sample_size"] == 0
    assert MeterState().get("skipped_updates") == 1
    with torch.no_grad():
        weight.copy_(kept)
    norm, log = one_update(criterion, model, optimizer, 2)
    assert norm > 0 and criterion.task.stepped == 2
    with metrics.aggregate() as logged:
        criterion.reduce_metrics([log])
    assert logged.get_smoothed_values()["earm_skipped_updates"] == 1
    with metrics.aggregate() as logged:
        criterion.reduce_metrics([{**log, "sample_size": 0}])
    assert math.isnan(logged["loss"].val) and logged["loss"].count == 0


def test_training_stops_when_no_update_is_finite():
    model = tiny_model().train()
    criterion = build(model)
    criterion.family.sampler = FixedSampler(model, NEGATIVES)
    optimizer = Optimizer(model)
    with torch.no_grad():
        model.decoder.output_projection.weight.fill_(math.nan)
    norms = [one_update(criterion, model, optimizer, update)[0] for update in range(MAX_SKIPPED_IN_A_ROW + 1)]
    assert norms[-2] == 0 and not torch.isfinite(norms[-1])


def test_a_non_finite_batch_does_not_spoil_the_moving_normaliser():
    model = tiny_model().train()
    criterion = build(model, earm_normalizer_ema=0.9)
    criterion.family.sampler = FixedSampler(model, NEGATIVES)
    criterion(model, batch(model))
    before = MeterState().get("log_normalizer").clone()
    with torch.no_grad():
        model.decoder.output_projection.weight.fill_(math.nan)
    criterion(model, batch(model))
    assert torch.equal(MeterState().get("log_normalizer"), before)
