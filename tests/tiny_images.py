"""Untrained pixel models of a few values, small enough to enumerate everything they can draw, and a few images to train on."""
from __future__ import annotations

import itertools
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import torch

from fairseq_earm.models.pixel_cnn import GatedPixelCnnModel, PixelCnnModel
from fairseq_earm.tasks.image_data import Levels
from tests.tiny_translation import OPTIMISATION, command

TASK = ["--task", "earm_image_modeling"]
SETTINGS = ["--image-levels", 8]
ARCH = "--arch gated_pixel_cnn_tiny --features 6 --layers 2 --hidden-features 8 --first-kernel 3".split()
MODELS = {"pixel_cnn": PixelCnnModel, "gated_pixel_cnn": GatedPixelCnnModel}


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


def build_images(folder):
    """64, 20 and 9 images of stripes, of 8 levels when read with `SETTINGS`, and a model `base` trained on them by stock commands."""
    splits = {"train": stripes(64), "valid": stripes(20, seed=1), "test": stripes(9, seed=2)}
    data = folder / "data"
    data.mkdir()
    np.savez(data / "stripes.npz", **splits)
    save = ["--save-dir", folder / "base", "--seed", 1, "--criterion", "cross_entropy"]
    command("train", data, *TASK, *SETTINGS, *ARCH, *OPTIMISATION, *save)
    return SimpleNamespace(folder=folder, data=data, base=folder / "base" / "checkpoint_last.pt")
