"""Drawing images against the enumerated distribution of a tiny pixel model, and the family that E-ARM sees of it."""
from __future__ import annotations

import math
from argparse import Namespace
from collections import Counter

import pytest
import torch

from fairseq_earm.errors import UsageError
from fairseq_earm.sampling.images import ImageFamily, draw_images
from tests.sampling.test_samplers import chi_square
from tests.tiny_images import MODELS, enumerate_images, tiny_pixel_model
from tests.tiny_model import tiny_model

FLAGS = {"earm_normalizer": "batch", "earm_energy_steps": "all", "ignore_prefix_size": 0, "earm_sampler": "ancestral"}


def family(**flags):
    return ImageFamily(Namespace(**{**FLAGS, **flags}))


def batch(model, rows=3):
    values = torch.randint(model.decoder.levels, (rows, model.max_positions()), generator=torch.Generator().manual_seed(5))
    return {"net_input": {"src_tokens": values, "src_lengths": None}, "target": values}


@pytest.mark.parametrize("shape", [(2, 3, 1), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_distribution_and_log_q_are_those_of_the_enumeration(name, shape):
    model = tiny_pixel_model(name, shape)
    exact = enumerate_images(model)
    assert math.isclose(sum(map(math.exp, exact.values())), 1.0, abs_tol=1e-9)
    values, log_q = draw_images(model.decoder, 4000, generator=torch.Generator().manual_seed(3))
    drawn = [tuple(image) for image in values.tolist()]
    assert log_q.sum(1).tolist() == pytest.approx([exact[image] for image in drawn], abs=1e-10)
    statistic, freedom = chi_square(Counter(drawn), {x: math.exp(p) for x, p in exact.items()}, len(drawn))
    assert statistic < freedom + 5 * math.sqrt(2 * freedom), (statistic, freedom)


def test_a_network_whose_steps_are_wrong_would_be_found():
    """The test above has the power to see the values in the wrong order."""
    model = tiny_pixel_model("gated_pixel_cnn", (2, 3, 1))
    exact = enumerate_images(model)
    values, _ = draw_images(model.decoder, 4000, generator=torch.Generator().manual_seed(3))
    wrong = Counter(tuple(image) for image in values.flip(1).tolist())
    statistic, freedom = chi_square(wrong, {x: math.exp(p) for x, p in exact.items()}, 4000)
    assert statistic > freedom + 10 * math.sqrt(2 * freedom)


def test_negatives_belong_to_rows_and_leave_no_trace():
    model = tiny_pixel_model("gated_pixel_cnn", (2, 2, 3), levels=5).train()
    before = torch.get_rng_state()
    one, again = (family().draw(model, batch(model), 2) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before) and model.training and model.decoder.training
    assert torch.equal(one.tokens, again.tokens)
    assert one.sources.tolist() == [0, 0, 1, 1, 2, 2]
    assert one.tokens.shape == one.log_q.shape == (6, 12) and one.mask.all() and not one.truncated.any()
    log_probs = model(one.tokens)[0].log_softmax(-1).gather(-1, one.tokens.unsqueeze(-1)).squeeze(-1)
    assert torch.allclose(log_probs, one.log_q, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_data_and_negatives_in_one_forward(name):
    model = tiny_pixel_model(name, (2, 2, 1), levels=3)
    sample, calls = batch(model), []
    samples = family().draw(model, sample, 2)
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    passes = family().forward(model, sample, samples)
    hook.remove()
    assert len(calls) == 1
    assert torch.equal(passes.data.logits, model(sample["target"])[0]) and passes.teacher_forced is passes.data
    assert torch.equal(passes.negatives.logits, model(samples.tokens)[0]) and passes.negatives.logits.requires_grad
    alone = family().forward(model, sample)
    assert torch.equal(alone.data.logits, passes.data.logits) and alone.negatives is None
    assert family().contrasted(sample["target"]) is sample["target"]


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"earm_energy_steps": "post"}, "--earm-energy-steps post: no step comes after an image's last value; use all or last"),
        ({"ignore_prefix_size": 2}, "--ignore-prefix-size 2"),
        ({"earm_sampler": "generator"}, "--earm-sampler generator"),
    ],
)
def test_flags_that_make_no_sense_for_images(flags, message):
    with pytest.raises(UsageError, match=message):
        family(**flags)


def test_other_models_are_refused():
    with pytest.raises(UsageError, match="TransformerModel cannot draw images; give --arch pixel_cnn"):
        family().check(tiny_model())
    family().check(tiny_pixel_model())
