"""--earm-dropout: E-ARM's passes without dropout, cross-entropy with it, in one forward of the wrapper."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn

from fairseq_earm.errors import UsageError
from fairseq_earm.sampling.joint_forward import forward_with_negatives, without_dropout
from fairseq_earm.sampling.scheduled import Predictions, scheduled_sampling
from tests.criterions.stubs import NEGATIVES, FixedSampler, batch, build
from tests.criterions.test_earm_cross_entropy import gradients
from tests.families import FAMILIES
from tests.tiny_model import tiny_model


def undropped(model):
    """The same model with dropout 0 everywhere."""
    other = copy.deepcopy(model)
    for module in other.modules():
        if hasattr(module, "p"):
            module.p = 0.0
    return other


def outcome(model, **flags):
    criterion = build(model, earm_start_epoch=1, **flags)
    criterion.family.sampler = FixedSampler(model, NEGATIVES)
    torch.manual_seed(3)
    loss, _, log = criterion(model, batch(model))
    return loss, gradients(model, loss), log


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"earm_energy_steps": "last"},
        {"earm_control": "likelihood"},
        {"earm_control": "flat"},
        {"earm_control": "noise"},
        {"earm_objective": "nce"},
        {"earm_loss_rows": 2},
        {"earm_smooth_history": True},
    ],
    ids=str,
)
def test_off_is_cross_entropy_with_dropout_and_earm_without(flags):
    model = tiny_model(dropout=0.3).train()
    shared = {"earm_weight": 0.5, "label_smoothing": 0.1, **flags}
    found, gradient, log = outcome(model, earm_dropout="off", **shared)
    cross_entropy = outcome(model, **{**shared, "earm_weight": 0.0})
    plain = undropped(model)
    with_energy, without = outcome(plain, **shared), outcome(plain, **{**shared, "earm_weight": 0.0})
    expected = cross_entropy[0] + with_energy[0] - without[0]
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)  # attention takes its softmax in single precision
    assert log["earm_loss"].item() == pytest.approx(with_energy[2]["earm_loss"].item(), rel=1e-6)
    for name, each in gradient.items():
        whole = cross_entropy[1][name] + with_energy[1][name] - without[1][name]
        assert torch.allclose(each, whole, rtol=1e-4, atol=1e-5), name
    assert all(module.training for module in model.modules())


def test_energy_off_keeps_the_dropout_of_the_repeated_likelihood():
    """They differ by one term: the data's repeated likelihood, without dropout and with it."""
    model = tiny_model(dropout=0.3).train()
    shared = {"earm_weight": 1.0}
    off, energy_off = outcome(model, earm_dropout="off", **shared), outcome(model, earm_dropout="energy-off", **shared)
    repeated = [
        outcome(each, earm_control="likelihood", **shared)[2]["earm_loss"].item() for each in (undropped(model), model)
    ]
    assert abs(repeated[1] - repeated[0]) > 0.1
    assert (energy_off[0] - off[0]).item() == pytest.approx(repeated[1] - repeated[0], rel=1e-5)
    assert energy_off[2]["earm_dv"].item() == pytest.approx(off[2]["earm_dv"].item(), abs=1e-6)


@pytest.mark.parametrize("dropout", ["off", "energy-off"])
@pytest.mark.parametrize(
    "name, flags",
    [*((name, {}) for name in FAMILIES if "pixel" not in name), ("encoder-decoder", {"earm_energy_steps": "post"})],
)
def test_where_there_is_no_dropout_it_changes_nothing(name, flags, dropout):
    family = FAMILIES[name](rounded=False)
    samples = family.criterion().family.draw(family.model, family.sample, 3)
    losses, left = [], []
    for passes in ({}, {"earm_dropout": dropout}):
        criterion = family.criterion(earm_weight=0.7, earm_negatives=3, **flags, **passes)
        criterion.family.draw = lambda model, sample, negatives: samples
        losses.append(criterion(family.model, family.sample)[0])
        carried = getattr(family.model.decoder, "carried", None)
        left.append(carried and carried.left)
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-6)
    found = [torch.autograd.grad(loss, list(family.model.parameters()), allow_unused=True) for loss in losses]
    for one, other in zip(*found):
        assert (one is None) == (other is None) and (one is None or torch.allclose(one, other, rtol=1e-4, atol=1e-6))
    assert left[0] is None or torch.equal(*left)  # memory that is carried on comes from the pass of cross-entropy


def test_images_have_no_dropout_to_leave_out():
    with pytest.raises(UsageError, match="--earm-dropout off: no effect"):
        FAMILIES["pixel_cnn"](rounded=False).criterion(earm_dropout="off")


def test_the_wrapper_runs_once_and_without_e_arm_there_is_no_further_pass():
    model = tiny_model(dropout=0.5).train()
    calls = []
    for name, module in (("model", model), ("encoder", model.encoder), ("decoder", model.decoder)):
        module.register_forward_hook(lambda module, *rest, name=name: calls.append((name, module.training)))
    outcome(model, earm_dropout="off")
    assert sorted(calls) == sorted(
        [
            ("model", True),
            *[("encoder", mode) for mode in (True, False)],
            *[("decoder", mode) for mode in (True, False, False)],
        ]
    )
    calls.clear()
    outcome(model, earm_dropout="off", earm_weight=0.0, earm_loss_rows=2)
    assert sorted(calls) == [("decoder", True), ("encoder", True), ("model", True)]


def test_under_scheduled_sampling_energies_are_read_from_the_data_s_words():
    model = tiny_model(dropout=0.3).train()
    found = []
    for replaced in (False, True):
        with scheduled_sampling(model, 0.0, Predictions("argmax")) if replaced else contextlib.nullcontext():
            found.append(outcome(model, earm_dropout="off", earm_weight=0.5))
    assert found[0][2]["earm_loss"].item() == pytest.approx(found[1][2]["earm_loss"].item(), rel=1e-6)
    assert found[0][2]["nll_loss"] != found[1][2]["nll_loss"]


def test_adaptive_softmax_has_no_dropout_either():
    settings = {"adaptive_softmax_cutoff": "4", "adaptive_softmax_dropout": 0.5}
    model = tiny_model(words=4, dropout=0.0, **settings).train()
    sample, samples = batch(model), None
    family = build(model, earm_dropout="off").family
    first, second = (family.forward(model, sample, samples) for _ in range(2))
    assert torch.equal(first.without_dropout.logits, second.without_dropout.logits)
    assert not torch.equal(first.data.logits, second.data.logits)


def test_recurrent_layers_stay_in_training_mode_and_lose_their_dropout():
    """cuDNN has no backward pass for them in eval mode."""
    model = nn.Sequential(nn.LSTM(2, 2, num_layers=2, dropout=0.5), nn.Dropout(0.5)).train()
    with without_dropout(model):
        assert model[0].training and model[0].dropout == 0 and not model[1].training
    assert model[0].training and model[0].dropout == 0.5 and model[1].training


def test_layers_that_are_computed_again_are_refused():
    model = tiny_model(dropout=0.1, checkpoint_activations=True).train()
    with pytest.raises(UsageError, match="--earm-dropout off: --checkpoint-activations"):
        outcome(model, earm_dropout="off")


def test_modes_are_restored_after_a_failure():
    model = tiny_model(dropout=0.5).train()
    sample = batch(model)

    def broken(inner):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        forward_with_negatives(model, sample["net_input"], data_again=broken)
    assert (
        all(module.training for module in model.modules())
        and not model._forward_hooks
        and not model.encoder._forward_hooks
    )
