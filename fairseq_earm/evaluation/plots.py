"""Figures of a training run, drawn from fairseq's own log (`--log-format json`) and written as PNG."""
from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Dict, List, Mapping, Sequence, Tuple, Union

# Importing fairseq may leave the root logger at DEBUG, and matplotlib then reports every font it looks at.
logging.getLogger("matplotlib").setLevel(logging.WARNING)

import matplotlib  # noqa: E402

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402

PathLike = Union[str, Path]
# One record of a log: what kind ("train_inner", "train", "valid"), then a JSON object.
RECORD = re.compile(r"(?<![\w.])(train_inner|train|valid\w*|test)[ |:]+(\{\".*\})\s*$")
COLOURS = plt.get_cmap("tab10").colors


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


def _tidy(axis) -> None:
    axis.grid(alpha=0.3)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _save(figure, path: PathLike, title: str) -> None:
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)
