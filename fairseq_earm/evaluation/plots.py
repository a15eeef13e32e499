"""Figures of texts and of joint models; PNG."""
from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Mapping, Optional, Sequence, Tuple, Union

# Importing fairseq may leave the root logger at DEBUG, and matplotlib then reports every font it looks at.
logging.getLogger("matplotlib").setLevel(logging.WARNING)

import matplotlib  # noqa: E402
import numpy as np  # noqa: E402

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402

from fairseq_earm.evaluation.whole_file import whole_file  # noqa: E402

PathLike = Union[str, Path]
COLOURS = plt.get_cmap("tab10").colors
# Okabe and Ito's colours, which colour-blind people tell apart; each with a line and a hatch of its own.
SOURCES = {"data": ("#000000", "-", ""), "base": ("#E69F00", "--", "//"), "joint": ("#0072B2", ":", "..")}


def energy_histograms(
    energies: Mapping[str, Tuple[Sequence[float], Sequence[float]]], path: PathLike, title: str = "", bins: int = 30,
) -> None:
    """One panel per model: how the energies −log μ of data and of the model's own samples are spread.

    The axis leaves out half a per cent at either end, so that a few outliers do not squeeze the rest; the means count all.

    Args:
        energies: label → (energies of data, energies of samples), in nats.
        path: PNG to write.
    """
    figure, axes = plt.subplots(1, len(energies), figsize=(4.2 * len(energies), 3.6), squeeze=False, layout="constrained")
    for axis, (label, (data, samples)) in zip(axes[0], energies.items()):
        both = sorted([*data, *samples])
        outside = len(both) // 200
        limits = (both[outside], both[-1 - outside])
        for values, name, colour in ((data, "data", COLOURS[0]), (samples, "model's samples", COLOURS[1])):
            axis.hist(values, bins=bins, range=limits, density=True, alpha=0.5, color=colour, label=name)
            axis.axvline(sum(values) / len(values), color=colour, linewidth=1.5, linestyle="--")
        axis.set(title=label, xlabel="energy −log μ (nats); dashed: mean", ylabel="density")
        tidy(axis)
    axes[0][0].legend(frameon=False)
    save(figure, path, title)


def effective_sample_sizes(shares: Mapping[str, Sequence[float]], samples: int, path: PathLike, title: str = "") -> None:
    """How evenly the weights μ/Z are spread over the samples of each source: 1 where all weigh the same.

    Args:
        shares: label → effective sample size of each source, as a share of its samples.
        samples: samples per source.
        path: PNG to write.
    """
    figure, axis = plt.subplots(figsize=(2 + 1.3 * len(shares), 4.2), layout="constrained")
    axis.boxplot([list(values) for values in shares.values()], showfliers=False, whis=(5, 95), widths=0.6)
    axis.set_xticks(range(1, len(shares) + 1), [label.replace(", ", ",\n") for label in shares], fontsize=8)
    axis.set(ylim=(0, 1.02), ylabel=f"effective sample size / {samples}")
    axis.set_xlabel("box: quartiles over sources; whiskers: 5 and 95 %", fontsize=8)
    tidy(axis)
    save(figure, path, title)


def unique_ngrams(shares: Mapping[str, Mapping[str, Optional[float]]], path: PathLike, title: str = "") -> None:
    """Groups of bars: the share of distinct n-grams in each source of text.

    Args:
        shares: "data", "base", "joint" → {order of the n-grams: share, or None}.
        path: PNG to write.
    """
    figure, axis = plt.subplots(figsize=(6, 4.2), layout="constrained")
    orders = list(next(iter(shares.values())))
    width = 0.8 / len(shares)
    for number, (source, values) in enumerate(shares.items()):
        colour, _, hatch = SOURCES[source]
        places = [place + (number - (len(shares) - 1) / 2) * width for place in range(len(orders))]
        heights = [100 * (values[n] or 0.0) for n in orders]
        bars = axis.bar(places, heights, width, facecolor="white", edgecolor=colour, hatch=hatch or None, label=_of(source))
        if not hatch:
            for bar in bars:
                bar.set_facecolor(colour)
        for place, height in zip(places, heights):
            axis.annotate(f"{height:.1f}", (place, height), (0, 2), textcoords="offset points", ha="center", fontsize=8)
    axis.set_xticks(range(len(orders)), [f"{n}-grams" for n in orders])
    axis.set(ylabel="distinct n-grams, % of all", ylim=(0, 112))
    axis.legend(frameon=False, ncols=3, loc="upper center")
    tidy(axis)
    save(figure, path, title)


def log_probability_densities(log_probs: Mapping[str, Mapping[str, Mapping]], path: PathLike, title: str = "") -> None:
    """One panel per model: how the log-probabilities of data and of samples are spread under it, and their means.

    Args:
        log_probs: model → "data", "base", "joint" → {"values", "mean"}, in nats.
        path: PNG to write.
    """
    figure, axes = plt.subplots(1, len(log_probs), figsize=(5.2 * len(log_probs), 4.4), squeeze=False, layout="constrained")
    for axis, (model, sources) in zip(axes[0], log_probs.items()):
        everything = [value for figures in sources.values() for value in figures["values"]]
        margin = 0.1 * (max(everything) - min(everything)) + 1e-6
        grid = np.linspace(min(everything) - margin, max(everything) + margin, 300)
        for source, figures in sources.items():
            colour, line, _ = SOURCES[source]
            style = {"color": colour, "linestyle": line}
            label = f"{_of(source)}, mean {figures['mean']:.2f}"
            axis.plot(grid, kernel_density(figures["values"], grid), linewidth=1.8, label=label, **style)
            axis.axvline(figures["mean"], linewidth=1, **style)
        axis.set(title=f"under the {model} model", xlabel="log-probability of a continuation (nats); vertical: mean", ylim=(0, None))
        axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18))
        tidy(axis)
    axes[0][0].set_ylabel("density")
    save(figure, path, title)


def kernel_density(values: Sequence[float], grid: np.ndarray) -> np.ndarray:
    """Density of values along a grid, by Gaussian kernels with Silverman's bandwidth."""
    points = np.asarray(values, dtype=np.float64)
    bandwidth = max(1.06 * points.std() * len(points) ** -0.2, (grid[-1] - grid[0]) / 300)
    kernels = np.exp(-0.5 * ((grid[:, None] - points) / bandwidth) ** 2)
    return kernels.mean(1) / (bandwidth * np.sqrt(2 * np.pi))


def gain_by_position(steps: Sequence[Mapping[str, float]], path: PathLike, title: str = "") -> None:
    """How much lower the joint model's perplexity is at each position, between bounds.

    Args:
        steps: {"step", "base", "lower", "upper"}, perplexities, as `residual.summarize` has them.
        path: PNG to write.
    """
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    places = [row["step"] for row in steps]
    least, most = ([100 * (1 - row[bound] / row["base"]) for row in steps] for bound in ("upper", "lower"))
    colour = SOURCES["joint"][0]
    axis.fill_between(places, least, most, color=colour, alpha=0.25, linewidth=0, label="between the bounds")
    axis.plot(places, least, color=colour, linewidth=1, marker="v", markersize=3, label="by the upper bound of the perplexity")
    axis.plot(places, most, color=colour, linewidth=1, marker="^", markersize=3, linestyle="--", label="by the lower bound")
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(xlabel="token of the continuation", ylabel="joint model's perplexity below the base's, %")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(frameon=False, fontsize=8)
    tidy(axis)
    save(figure, path, title)


def estimates_by_samples(joint: Sequence[Mapping[str, float]], base: float, path: PathLike, title: str = "") -> None:
    """How the two estimates of the joint model's perplexity close in on each other with more samples.

    Args:
        joint: {"samples", "perplexity_lower", "perplexity_upper"}, as `residual.summarize` has them.
        base: the base's perplexity.
        path: PNG to write.
    """
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    samples = [row["samples"] for row in joint]
    upper, lower = ([row[f"perplexity_{bound}"] for row in joint] for bound in ("upper", "lower"))
    colour = SOURCES["joint"][0]
    axis.fill_between(samples, lower, upper, color=colour, alpha=0.25, linewidth=0)
    axis.plot(samples, upper, color=colour, marker="v", label="joint, upper estimate")
    axis.plot(samples, lower, color=colour, marker="^", linestyle="--", label="joint, lower estimate")
    axis.axhline(base, color=SOURCES["base"][0], linestyle="-.", label="base")
    axis.set(xscale="log", xlabel="samples of each prefix", ylabel="perplexity per token")
    axis.minorticks_off()
    axis.set_xticks(samples, [f"{n:,}" for n in samples])
    axis.legend(frameon=False, fontsize=8)
    tidy(axis)
    save(figure, path, title)


def _of(source: str) -> str:
    return source if source == "data" else f"{source} samples"


def tidy(axis) -> None:
    """A grid, and no frame above and to the right."""
    axis.grid(alpha=0.3)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def save(figure, path: PathLike, title: str) -> None:
    """Write the figure as a whole, in the format of the file's ending, and forget it."""
    figure.suptitle(title)
    try:
        with whole_file(path) as file:
            figure.savefig(file, dpi=130, format=os.path.splitext(path)[1][1:] or "png")
    finally:
        plt.close(figure)
