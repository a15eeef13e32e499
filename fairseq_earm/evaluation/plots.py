"""Figures of training runs, drawn from fairseq's own log (`--log-format json`), and of texts and joint models; PNG."""
from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Dict, List, Mapping, Optional, Sequence, Tuple, Union

# Importing fairseq may leave the root logger at DEBUG, and matplotlib then reports every font it looks at.
logging.getLogger("matplotlib").setLevel(logging.WARNING)

import matplotlib  # noqa: E402
import numpy as np  # noqa: E402

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402

PathLike = Union[str, Path]
# One record of a log: what kind ("train_inner", "train", "valid"), then a JSON object.
RECORD = re.compile(r"(?<![\w.])(train_inner|train|valid\w*|test)[ |:]+(\{\".*\})\s*$")
COLOURS = plt.get_cmap("tab10").colors
# Okabe and Ito's colours, which colour-blind people tell apart; each with a line and a hatch of its own.
SOURCES = {"data": ("#000000", "-", ""), "base": ("#E69F00", "--", "//"), "joint": ("#0072B2", ":", "..")}


def read_log(path: PathLike) -> Dict[str, List[Dict[str, float]]]:
    """The records of a fairseq log in JSON format, by kind, in order.

    Keys of "train" and "valid" records lose that prefix, so that `num_updates` and `nll_loss` are found everywhere.
    fairseq's `loss`, `nll_loss` and `ppl` are in base 2, per token. Lines that are no records are passed over.
    """
    records: Dict[str, List[Dict[str, float]]] = {}
    for line in Path(path).read_text(errors="replace").splitlines():
        match = RECORD.search(line)
        if match is None:
            continue
        kind, values = match.group(1), json.loads(match.group(2))
        values = {key[len(kind) + 1:] if key.startswith(kind + "_") else key: value for key, value in values.items()}
        records.setdefault(kind, []).append({key: float(value) for key, value in values.items() if is_number(value)})
    return records


def is_number(value) -> bool:
    """Whether a log's value, a number or its text, is one."""
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def series(records: Sequence[Mapping[str, float]], key: str) -> Tuple[List[float], List[float]]:
    """Updates and values of one key, where it was logged."""
    points = [(r["num_updates"], r[key]) for r in records if key in r and "num_updates" in r]
    return [x for x, _ in points], [y for _, y in points]


def training_curves(
    logs: Mapping[str, Sequence[PathLike]], panels: Sequence[Tuple[str, str, str]], path: PathLike, title: str = "",
) -> None:
    """One panel per logged key, one colour per label, a thin line for each run and a thick one for the mean of several.

    Args:
        logs: label → logs of its runs (seeds).
        panels: (kind of record, key, axis label).
        path: PNG to write.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 4.2), squeeze=False, layout="constrained")
    runs = {label: [read_log(log) for log in paths] for label, paths in logs.items()}
    for axis, (kind, key, name) in zip(axes[0], panels):
        for colour, (label, records) in zip(COLOURS, runs.items()):
            _draw_runs(axis, [series(r.get(kind, []), key) for r in records], label, colour)
        axis.set(xlabel="update", ylabel=name)
        if key.endswith("dv"):
            axis.axhline(0, color="black", linewidth=0.8)
        _tidy(axis)
    handles, labels = _legend(axes[0])
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, max(1, len(labels))), frameon=False)
    _save(figure, path, title)


def _draw_runs(axis, runs: Sequence[Tuple[List[float], List[float]]], label: str, colour) -> None:
    runs = [(x, y) for x, y in runs if x]
    if not runs:
        return
    same_updates = all(x == runs[0][0] for x, _ in runs)
    mean = [sum(values) / len(runs) for values in zip(*(y for _, y in runs))] if same_updates else None
    for x, y in runs:
        alone = mean is None or len(runs) == 1
        axis.plot(x, y, color=colour, linewidth=1.8 if alone else 0.6, alpha=1 if alone else 0.4, label=label if alone else None)
    if mean is not None and len(runs) > 1:
        axis.plot(runs[0][0], mean, color=colour, linewidth=2, label=label)


def _legend(axes) -> Tuple[list, list]:
    """Every label once, whichever panels it appears in."""
    found = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            found.setdefault(label, handle)
    return list(found.values()), list(found)


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
        _tidy(axis)
    axes[0][0].legend(frameon=False)
    _save(figure, path, title)


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
    _tidy(axis)
    _save(figure, path, title)


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
    _tidy(axis)
    _save(figure, path, title)


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
        _tidy(axis)
    axes[0][0].set_ylabel("density")
    _save(figure, path, title)


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
    _tidy(axis)
    _save(figure, path, title)


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
    _tidy(axis)
    _save(figure, path, title)


def _of(source: str) -> str:
    return source if source == "data" else f"{source} samples"


def _tidy(axis) -> None:
    axis.grid(alpha=0.3)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _save(figure, path: PathLike, title: str) -> None:
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)
