"""The criterion's controls and its other ways to train: with what they leave out, and every figure where it belongs."""

from __future__ import annotations

import argparse
import math

import pytest
import torch
from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.logging import metrics

from fairseq_earm.criterions.earm_config import EarmCrossEntropyConfig
from fairseq_earm.ebm.objectives import control_named
from fairseq_earm.errors import UsageError
from tests.criterions.stubs import NEGATIVES, FixedSampler, batch, build
from tests.criterions.test_earm_cross_entropy import gradients, numbers
from tests.criterions.test_training_clock import Optimizer, one_update
from tests.tiny_model import tiny_model


def outcome(model, negatives=NEGATIVES, **flags):
    """Loss, gradients and log of one batch."""
    criterion = build(model, **flags)
    if negatives is not None:
        criterion.family.sampler = FixedSampler(model, negatives)
    loss, _, log = criterion(model, batch(model))
    return loss.item(), gradients(model, loss), log


def same(ours, theirs):
    """As far as fairseq's attention allows, which takes its softmax in single precision."""
    return all(torch.allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-5) for name in theirs)


def difference(one, other):
    return {name: one[name] - other[name] for name in one}


@pytest.mark.parametrize(
    "stored, control",
    [
        (True, "likelihood"),
        (False, "none"),
        ("True", "likelihood"),
        ("False", "none"),
        ("noise", "noise"),
        (None, "none"),
    ],
)
def test_what_version_0_1_stored_goes_on_meaning_the_same(stored, control):
    assert build(tiny_model(), earm_control=stored).control == control


def test_the_bare_flag_is_the_likelihood_control():
    parser = argparse.ArgumentParser()
    gen_parser_from_dataclass(parser, EarmCrossEntropyConfig())
    given = {"none": [], "likelihood": ["--earm-control", "--earm-weight", "1"], "noise": ["--earm-control", "noise"]}
    assert {name: control_named(parser.parse_args(words).earm_control) for name, words in given.items()} == {
        name: name for name in given
    }


@pytest.mark.parametrize("steps, m", [("all", 1), ("last", 0), ("post", 2)])
def test_the_flat_control_adds_the_variance_of_the_data_s_energies(steps, m):
    model = tiny_model().train()
    flags = {"earm_weight": 0.5, "earm_recent_tokens": m, "earm_energy_steps": steps}
    found, _, log = outcome(model, None, earm_control="flat", earm_control_weight=0.3, **flags)
    likelihood, _, _ = outcome(model, None, earm_control="likelihood", **flags)
    sample = batch(model)
    rows = [[t for t in row if t != model.decoder.dictionary.pad()] for row in sample["target"].tolist()]
    lse = [[each[0] for each in numbers(model, sample, i, row)] for i, row in enumerate(rows)]
    if steps == "all":
        columns = [[row[k] for row in lse if len(row) - 1 > k] for k in range(max(map(len, lse)) - 1)]
    else:
        columns = [[row[-1 if steps == "post" else -2] for row in lse]]
    penalty = sum(len(column) * torch.stack(column).var(unbiased=False).item() for column in columns)
    assert found - likelihood == pytest.approx(0.5 * 0.3 * penalty)
    assert penalty > 0.1 and log["earm_negatives"] == 0 and log["earm_batches"] == 1


@pytest.mark.parametrize("reduction", ["none", "rao-blackwell", "full"])
def test_noise_has_everything_but_the_energy(reduction):
    """Another offset of the logits changes E-ARM and leaves the noise control as it is."""
    found = {}
    for shift in (0.0, 0.4):
        model = tiny_model().train()
        bias = torch.nn.Parameter(
            shift * torch.randn(8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        )
        model.decoder.output_projection.register_forward_hook(
            lambda module, inputs, output: output + (inputs[0] @ bias).unsqueeze(-1)
        )
        for control in ("noise", "none"):
            found[shift, control] = outcome(
                model, earm_control=control, earm_variance_reduction=reduction, earm_weight=0.5
            )
    assert found[0.0, "noise"][0] == pytest.approx(found[0.4, "noise"][0], rel=1e-10)
    assert found[0.0, "none"][0] != pytest.approx(found[0.4, "none"][0], rel=1e-4)
    assert found[0.0, "noise"][2]["earm_dv"] != found[0.4, "noise"][2]["earm_dv"] != 0


def test_noise_draws_matches_counts_and_is_shared_like_earm():
    model = tiny_model().train()
    *_, noise = outcome(model, earm_control="noise")
    *_, earm = outcome(model)
    for key in ("earm_steps", "earm_dv", "earm_ess", "earm_negatives", "earm_negative_tokens", "earm_distinct"):
        assert noise[key].item() == pytest.approx(earm[key].item()), key
    assert noise["earm_loss"] != earm["earm_loss"]
    criterion = build(model, earm_control="noise", earm_normalizer_ema=0.9)
    criterion.family.sampler = FixedSampler(model, NEGATIVES)
    criterion(model, batch(model))
    assert criterion._shares_normalizer() and criterion.moving_normalizer is not None


@pytest.mark.parametrize("flags", [{}, {"earm_control": "likelihood"}, {"earm_objective": "nce"}])
def test_replace_leaves_the_loss_of_earm_alone(flags):
    model = tiny_model().train()
    alone = outcome(model, earm_cross_entropy="replace", earm_weight=1.0, label_smoothing=0.1, **flags)
    added = outcome(model, earm_weight=1.0, label_smoothing=0.1, **flags)
    cross_entropy = outcome(model, earm_weight=0.0, label_smoothing=0.1, **flags)
    assert alone[0] == pytest.approx(added[0] - cross_entropy[0])
    assert alone[0] == pytest.approx(alone[2]["earm_loss"].item())
    assert same(alone[1], difference(added[1], cross_entropy[1]))
    assert alone[2]["nll_loss"] == added[2]["nll_loss"]  # what is logged of the data stays


def test_under_replace_cross_entropy_fades_out_during_the_warm_up():
    model = tiny_model().train()
    criterion = build(model, earm_cross_entropy="replace", earm_weight=2.0, earm_warmup_updates=4, earm_start_update=0)
    criterion.family.sampler = FixedSampler(model, NEGATIVES)
    optimizer = Optimizer(model)
    losses = []
    for update in range(5):
        _, _, log = criterion.task.train_step(batch(model), model, criterion, optimizer, update_num=update)
        losses.append((log["loss"] - min(1, (update + 1) / 4) * 2.0 * log["earm_loss"]).item() / log["nll_loss"].item())
    assert losses == pytest.approx([0.75, 0.5, 0.25, 0, 0])


def test_every_n_th_update_has_n_times_the_weight_and_the_others_none():
    model = tiny_model().train()
    criterion = build(model, earm_every=3, earm_weight=0.5, earm_start_update=2, earm_normalizer_ema=0.9)
    criterion.family.sampler = FixedSampler(model, NEGATIVES)
    optimizer, logs, seen = Optimizer(model), [], []
    for update in range(8):
        logs.append(one_update(criterion, model, optimizer, update)[1])
        seen.append(criterion.schedule.current_weight())
    assert seen == [0, 0, 0, 1.5, 0, 0, 1.5, 0]
    assert [log["earm_batches"].item() for log in logs] == [0, 0, 0, 1, 0, 0, 1, 0]
    used = logs[3]
    assert (used["loss"] - 1.5 * used["earm_loss"]).item() == pytest.approx(logs[0]["loss"].item())
    with metrics.aggregate() as logged:
        for log in logs:
            criterion.reduce_metrics([log])
    mean = logged.get_smoothed_values()["earm_dv"]
    assert mean == pytest.approx(
        (used["earm_dv"] / used["earm_steps"]).item(), abs=2e-4
    )  # not of eight updates, six of them 0


def test_the_moving_normaliser_counts_the_updates_that_have_earm():
    model = tiny_model().train()
    states = []
    for every in (1, 2):
        metrics.reset()
        criterion = build(model, earm_every=every, earm_start_update=0, earm_normalizer_ema=0.5)
        criterion.family.sampler = FixedSampler(model, NEGATIVES)
        for update in range(2 * every):
            criterion.task.train_step(batch(model), model, criterion, Optimizer(model), update_num=update)
        states.append(criterion.moving_normalizer)
    assert torch.allclose(*states)


def test_clipping_is_logged_of_the_updates_that_have_earm():
    model = tiny_model().train()
    plain = build(model, earm_every=2, earm_start_update=0, earm_weight=1.0, clip_norm=1e-3)
    plain.family.sampler = FixedSampler(model, NEGATIVES)
    optimizer, norms = Optimizer(model), []
    with metrics.aggregate() as logged:
        for update in range(4):
            model.zero_grad()
            norms.append(one_update(plain, model, optimizer, update)[0].item())
    values = logged.get_smoothed_values()
    assert values["earm_clip"] == 100.0
    assert values["earm_gnorm"] == pytest.approx((norms[0] + norms[2]) / 2, abs=1e-2) and abs(norms[0] - norms[1]) > 0.1
    with metrics.aggregate() as logged:
        always = build(model, earm_start_update=0, clip_norm=1e-3)
        always.family.sampler = plain.family.sampler
        one_update(always, model, Optimizer(model), 0)
    assert "earm_clip" not in logged.get_smoothed_values()


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"earm_control": "data-bin"}, "--earm-control data-bin: give one of likelihood, noise, flat"),
        (
            {"earm_control": "noise", "earm_objective": "nce"},
            "--earm-objective nce: the controls are those of kl; leave --earm-control noise out",
        ),
        (
            {"earm_control": True, "earm_objective": "nce"},
            "--earm-objective nce: the controls are those of kl; leave --earm-control likelihood",
        ),
        (
            {"earm_control": "flat", "earm_control_weight": 0.0},
            "--earm-control-weight 0.0: give a finite number above 0",
        ),
        (
            {"earm_control": "flat", "earm_control_weight": math.inf},
            "--earm-control-weight inf: give a finite number above 0",
        ),
        (
            {"earm_control": "noise", "earm_control_weight": 2.0},
            "--earm-control-weight 2.0: no effect without --earm-control flat",
        ),
        (
            {"earm_sampler": "generator", "earm_sampling_topk": 2},
            "--earm-variance-reduction full: its baseline needs samples of the softmax itself",
        ),
        ({"earm_sampler": "generator", "earm_sampling_topp": 0.5}, "--earm-variance-reduction full: .* give none"),
        (
            {"earm_sampler": "generator", "earm_sampling_temperature": 0.5, "earm_control": "noise"},
            "--earm-variance-reduction full",
        ),
        (
            {"earm_objective": "nce", "earm_normalizer_ema": 0.5},
            "--earm-normalizer-ema 0.5: --earm-objective nce differentiates",
        ),
        ({"earm_every": 0}, "--earm-every 0: give a number of updates of at least 1"),
        (
            {"earm_control": "likelihood", "earm_dropout": "energy-off"},
            "--earm-dropout energy-off: --earm-control likelihood has no energies",
        ),
        (
            {"earm_every": 2, "earm_cross_entropy": "replace"},
            "--earm-every 2: --earm-cross-entropy replace would leave the other updates",
        ),
        (
            {"earm_every": 10, "earm_start_update": 11, "max_update": 20},
            "--earm-every 10: no update from --earm-start-update 11",
        ),
        ({"earm_control": "noise", "earm_normalizer": "source"}, "--earm-negatives 1: one negative per source"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags, message):
    with pytest.raises(UsageError, match=message):
        build(tiny_model(), **flags)


@pytest.mark.parametrize(
    "flags",
    [
        {"earm_sampler": "generator", "earm_sampling_topk": 2, "earm_objective": "nce"},
        {"earm_every": 10, "earm_start_update": 11, "max_update": 21},
    ],
)
def test_what_does_no_harm_is_taken(flags):
    assert build(tiny_model(), **flags).cfg.earm_weight > 0
