"""Half precision: energies, weights and losses are those of the model's logits in float32; how far training is from float32's."""
from __future__ import annotations

from unittest import mock

import pytest
import torch
from fairseq.logging import metrics

from fairseq_earm.compat import computes_half_on_cpu
from fairseq_earm.sampling.ancestral import AncestralSampler
from fairseq_earm.sampling.heads import LogitHead
from tests.criterions.stubs import NEGATIVES, FixedSampler, batch, build
from tests.known_negatives import known_negatives
from tests.tiny_model import tiny_model
from tests.tiny_translation import train

FIGURES = ("loss", "nll_loss", "earm_loss", "earm_dv", "earm_energy_data", "earm_energy_negatives", "earm_ess", "earm_max_weight")
HALVES = [pytest.param(torch.float16, marks=pytest.mark.skipif(not computes_half_on_cpu(), reason="no float16 on CPU")), torch.bfloat16]
FLAGS = [{"label_smoothing": 0.1}, {"earm_energy_steps": "last"}, {"earm_energy_steps": "post", "earm_normalizer_ema": 0.5}]


def half_criterion(dtype, largest=None, **flags):
    """Model in half precision with logits up to ±largest, its criterion with known negatives, and a batch; no moving normaliser yet."""
    metrics.reset()
    model = tiny_model().train()
    sample = batch(model)
    if largest is not None:
        with torch.no_grad():
            logits = model(**sample["net_input"])[0]
            model.decoder.output_projection.weight.mul_(largest / logits.abs().max())
    criterion = build(model, **flags)
    criterion.family.sampler = FixedSampler(model, NEGATIVES)
    return model.to(dtype), criterion, sample


def from_wide_logits(criterion):
    """Have the criterion read the model's logits in float64."""
    forward_of = criterion.family.forward

    def wide(*args):
        passes = forward_of(*args)
        return type(passes)(*(head and LogitHead(head.logits.double()) for head in passes))

    criterion.family.forward = wide


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("largest", [None, 80.0])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_nothing_is_lost_behind_the_logits(dtype, largest, flags):
    model, criterion, sample = half_criterion(dtype, largest, **flags)
    loss, _, log = criterion(model, sample)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(bool(torch.isfinite(weight.grad).all()) for weight in model.parameters() if weight.grad is not None)
    model, criterion, sample = half_criterion(dtype, largest, **flags)
    from_wide_logits(criterion)
    _, _, expected = criterion(model, sample)
    for figure in FIGURES:
        assert log[figure].item() == pytest.approx(expected[figure].item(), rel=1e-4, abs=1e-4), figure


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_logits_that_are_never_held_together_say_the_same(dtype, flags):
    found = []
    for rows in (0, 3):
        model, criterion, sample = half_criterion(dtype, 80.0, earm_loss_rows=rows, **flags)
        found.append(criterion(model, sample)[2])
    for figure in FIGURES:
        assert found[0][figure].item() == pytest.approx(found[1][figure].item(), rel=1e-3, abs=1e-3), figure


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_autocast(flags):
    """What --amp does on a GPU, where float16 takes bfloat16's place."""
    found = []
    for enabled in (False, True):
        model, criterion, sample = half_criterion(torch.float32, **flags)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss, _, log = criterion(model, sample)
        assert loss.dtype == torch.float32
        loss.backward()
        found.append(log)
    for figure in FIGURES:
        assert found[1][figure].item() == pytest.approx(found[0][figure].item(), rel=2e-2, abs=0.3), figure


# fairseq's own optimizer of flat gradients asks for a GPU, and its --bf16 for a TPU where there is none.
PRECISIONS = {
    "fp16": ["--fp16", "--fp16-no-flatten-grads", "--fp16-init-scale", 4],
    "memory-efficient fp16": ["--fp16", "--memory-efficient-fp16", "--fp16-init-scale", 4],
    "amp": ["--amp"],
}


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """(name, flags) → the log of four updates with E-ARM from the first, on known negatives."""
    earm = ["--criterion", "earm_cross_entropy", "--earm-start-update", 0, "--earm-weight", 1, "--earm-normalizer-ema", 0.5]
    flags = [*earm, "--label-smoothing", 0.1, "--dropout", 0, "--lr", 0.003, "--max-update", 4]

    def training(*precision):
        with mock.patch.object(AncestralSampler, "__call__", lambda sampler, *args: known_negatives(*args)):
            return train(tiny, tmp_path_factory.mktemp("run"), *flags, *precision).log()

    return training


@pytest.fixture(scope="module")
def single(run):
    return run()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_training_stays_near_that_in_float32(run, single, precision):
    """Losses within 0.5 %, energies and the DV bound within 0.02 nats, weights' effective sample size within 1 %."""
    if "fp16" in precision and not computes_half_on_cpu():
        pytest.skip("no float16 on CPU")
    found = run(*PRECISIONS[precision])
    assert len(found) == len(single) == 4
    for one, other in zip(found, single):
        for figure in ("loss", "nll_loss", "earm_loss"):
            assert one[figure] == pytest.approx(other[figure], rel=5e-3), figure
        for figure in ("earm_dv", "earm_energy_data", "earm_energy_negatives", "earm_log_normalizer"):
            assert one[figure] == pytest.approx(other[figure], abs=2e-2), figure
        assert one["earm_ess"] == pytest.approx(other["earm_ess"], abs=1e-2)
