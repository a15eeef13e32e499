"""Untrained pixel models of a few values, small enough to enumerate everything they can draw, and a few images to train on."""
from __future__ import annotations

import itertools
from argparse import Namespace

import numpy as np
import torch

from fairseq_earm.models.pixel_cnn import GatedPixelCnnModel, PixelCnnModel

MODELS = {"pixel_cnn": PixelCnnModel, "gated_pixel_cnn": GatedPixelCnnModel}


class Levels:
    """As much of a dictionary as a pixel model needs."""

    def __init__(self, levels: int):
        self.levels = levels

    def __len__(self) -> int:
        return self.levels

    def pad(self) -> int:
        return self.levels


def tiny_pixel_model(name: str = "gated_pixel_cnn", shape=(2, 2, 1), levels: int = 2, seed: int = 0, **sizes):
    """A pixel model in float64, in eval mode, with logits far from uniform."""
    flags = {"features": 6, "layers": 2, "hidden_features": 6, "first_kernel": 3, "kernel": 3, "arch": name, **sizes}
    torch.manual_seed(seed)
    model = MODELS[name].build_model(Namespace(**flags), Namespace(image_shape=shape, target_dictionary=Levels(levels)))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2.0)
    return model.double().eval()


def enumerate_images(model) -> dict:
    """Every image as a tuple of its values → its exact log-probability, by one full pass."""
    values = list(itertools.product(range(model.decoder.levels), repeat=model.max_positions()))
    images = torch.tensor(values)
    with torch.no_grad():
        log_probs = model(images)[0].log_softmax(-1)
    log_q = log_probs.gather(-1, images.unsqueeze(-1)).sum((1, 2))
    return dict(zip(values, log_q.tolist()))


def stripes(images: int, shape=(4, 4), seed: int = 0) -> np.ndarray:
    """uint8 (images, H, W): columns of one brightness each, with a little noise."""
    rng = np.random.default_rng(seed)
    columns = rng.integers(0, 200, (images, 1, shape[1]))
    return (columns + rng.integers(0, 40, (images, *shape))).astype(np.uint8)
