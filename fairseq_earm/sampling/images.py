"""Images: negatives are whole images that the model draws value by value."""
from __future__ import annotations

from typing import Callable, Iterable, Optional, Tuple

import torch
from torch import Tensor

from fairseq_earm.ebm.energy import widen
from fairseq_earm.errors import UsageError
from fairseq_earm.sampling.draw import draw
from fairseq_earm.sampling.family import ModelFamily, Passes
from fairseq_earm.sampling.isolation import isolated
from fairseq_earm.sampling.joint_forward import forward_with_negatives
from fairseq_earm.sampling.samples import Samples


@torch.no_grad()
def draw_images(
    decoder, count: int, *, generator: Optional[torch.Generator] = None, progress: Callable[[Iterable], Iterable] = iter
) -> Tuple[Tensor, Tensor]:
    """Draw images x ~ q(x), computing for each value only what the value before it changed.

    Args:
        decoder: has `stepwise(count)`, see `models.pixel_cnn.PixelDecoder`.
        count: number of images.
        generator: source of random numbers on the decoder's device; by default the global one.
        progress: put around the loop over the values of an image.
    Returns:
        (count, T) values, by rows, pixels and colours, and their exact log-probabilities, in nats.
    """
    steps, values, log_q = decoder.stepwise(count), [], []
    for _ in progress(range(decoder.max_positions())):
        drawn, log_probs = draw(widen(steps.logits()), generator)
        steps.append(drawn)
        values.append(drawn)
        log_q.append(log_probs)
    return torch.stack(values, 1), torch.stack(log_q, 1)


class ImageFamily(ModelFamily):
    """Negatives are images of the model's own, no given part of the data's in them; every value is a step.

    Args:
        cfg: the criterion's flags.
    Raises:
        UsageError: flags that images have no use for.
    """

    # All images are of one size, a value has few levels, and the networks have no dropout.
    without_effect = ("earm_max_len_a", "earm_max_len_b", "earm_loss_rows", "earm_sampling_bf16", "earm_dropout")

    def __init__(self, cfg):
        problems = (
            (cfg.earm_energy_steps == "post", "energy_steps", "no step comes after an image's last value; use all or last"),
            (cfg.earm_normalizer == "source", "normalizer", "an image has no source of its own; use batch"),
            (cfg.earm_sampler != "ancestral", "sampler", "images are drawn from the softmax itself; leave it out"),
        )
        for problem, name, remedy in problems:
            if problem:
                raise UsageError(f"--earm-{name.replace('_', '-')} {getattr(cfg, 'earm_' + name)}: {remedy}")
        if cfg.ignore_prefix_size > 0:
            raise UsageError(f"--ignore-prefix-size {cfg.ignore_prefix_size}: no value of an image is given; leave it out")

    def check(self, model) -> None:
        if not hasattr(getattr(model, "decoder", None), "stepwise"):
            raise UsageError(
                f"--task earm_image_modeling: {type(model).__name__} cannot draw images; give --arch pixel_cnn or gated_pixel_cnn"
            )

    def draw(self, model, sample, negatives) -> Samples:
        data = sample["net_input"]["src_tokens"]
        sources = torch.arange(data.size(0), device=data.device).repeat_interleave(negatives)
        with isolated(model, data):
            values, log_q = draw_images(model.decoder, sources.numel())
        everywhere = torch.ones_like(values, dtype=torch.bool)
        return Samples(values, everywhere, log_q, torch.zeros_like(sources, dtype=torch.bool), sources)

    def forward(self, model, sample, samples=None, *, energies=True) -> Passes:
        decoder = model.decoder
        negatives = None if samples is None else lambda _: decoder(samples.tokens)
        return self.passes(decoder, forward_with_negatives(model, sample["net_input"], negatives))
