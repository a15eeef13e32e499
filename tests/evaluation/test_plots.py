"""That figures are written and show something."""
import random

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.image import imread  # noqa: E402

from fairseq_earm.evaluation import plots  # noqa: E402


def is_drawn(path):
    picture = imread(path)
    return picture.shape[0] > 200 and picture.shape[1] > 200 and picture.std() > 0.01


def test_energy_histograms(tmp_path):
    target = tmp_path / "energies.png"
    plots.energy_histograms({"model": ([-3.0, -2.5, -2.0], [-2.5, -2.0, -1.0])}, target)
    assert is_drawn(target)


def test_effective_sample_sizes(tmp_path):
    target = tmp_path / "ess.png"
    plots.effective_sample_sizes({"a": [0.5, 0.7, 0.9], "b, c": [0.9, 1.0, 1.0]}, 16, target)
    assert is_drawn(target)


def test_unique_ngrams(tmp_path):
    target = tmp_path / "ngrams.png"
    plots.unique_ngrams({"data": {"2": 0.6, "3": None}, "base": {"2": 0.5, "3": 0.7}, "joint": {"2": 0.6, "3": 0.8}}, target, "title")
    assert is_drawn(target)


def test_kernel_density_is_a_density_around_its_values():
    rng = random.Random(1)
    values, grid = [rng.gauss(3.0, 2.0) for _ in range(2000)], np.linspace(-10, 16, 500)
    density = plots.kernel_density(values, grid)
    step = grid[1] - grid[0]
    assert density.sum() * step == pytest.approx(1, abs=1e-3)
    assert (density * grid).sum() * step == pytest.approx(np.mean(values), abs=1e-2)
    assert density.max() == pytest.approx(1 / (2 * np.sqrt(2 * np.pi)), rel=0.1)
    assert np.isfinite(plots.kernel_density([1.0, 1.0], grid)).all()


def test_log_probability_densities(tmp_path):
    target = tmp_path / "densities.png"
    sources = {name: {"values": [-3.0, -2.0, -1.0], "mean": -2.0} for name in ("data", "base", "joint")}
    plots.log_probability_densities({"base": sources, "joint": sources}, target)
    assert is_drawn(target)


def test_gain_by_position_and_estimates(tmp_path):
    targets = [tmp_path / "gain.png", tmp_path / "estimates.png"]
    plots.gain_by_position([{"step": n, "base": 9.0, "lower": 8.0, "upper": 8.5} for n in (1, 2, 3)], targets[0])
    joint = [{"samples": n, "perplexity_lower": 8 - 1 / n, "perplexity_upper": 8 + 1 / n} for n in (10, 100)]
    plots.estimates_by_samples(joint, 9.0, targets[1])
    assert all(map(is_drawn, targets))
