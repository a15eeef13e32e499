"""Curves of training: figures of several runs as PNG, and single panels as SVG for pages."""
from __future__ import annotations

import io
import re
from typing import Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from fairseq_earm.evaluation.plots import COLOURS, PathLike, plt, save, tidy
from fairseq_earm.evaluation.training_log import (
    EPOCHS, INNER, History, cross_entropy_key, earm_entry, read_log, series, validated_kinds,
)

Points = Tuple[List[float], List[float]]
# Runs on a page, in colours that stand out from a light and from a dark ground.
RUN_COLOURS = (
    "#2f7fd1", "#d9640b", "#2b9348", "#d43d51", "#9462d6", "#8a6d3b", "#c74aa4", "#7a7f87", "#828a00", "#0e8f9e",
)
INK = "#010203"  # stands for the page's own text colour
MOST_POINTS, MOST_MARKERS = 400, 30
LARGEST = 1e100  # matplotlib's axes overflow at numbers not much larger


def training_curves(
    logs: Mapping[str, Sequence[PathLike]], panels: Sequence[Tuple[str, str, str]], path: PathLike, title: str = "",
) -> None:
    """One panel per logged key, one colour per label, a thin line for each run and a thick one for the mean of several.

    Args:
        logs: label → logs of its runs (seeds).
        panels: (kind of record, key, axis label).
        path: PNG to write.
    """
    runs = {label: [read_log(log) for log in paths] for label, paths in logs.items()}
    figure, axes = _figure(len(panels))
    for axis, (kind, key, name) in zip(axes, panels):
        for colour, (label, histories) in zip(COLOURS, runs.items()):
            _draw_runs(axis, [series(history.get(kind, []), key) for history in histories], label, colour)
        axis.set(xlabel="update", ylabel=name)
        if key.endswith("dv"):
            axis.axhline(0, color="black", linewidth=0.8)
        tidy(axis)
    _legend(figure, axes)
    save(figure, path, title)


class Convergence(NamedTuple):
    """One run's cross-entropy on each set.

    Attributes:
        key: `nll_loss`, or `loss` where the criterion logs that alone; fairseq's base 2, per token.
        curves: set → (epochs or updates, cross-entropy). The training set's is the average over the epoch, or over an interval
            of the log, with dropout as it trained.
        earm: first epoch (update) that logged E-ARM, where an earlier one did not; else None.
    """

    key: str
    curves: Dict[str, Points]
    earm: Optional[float]


def convergence_of(history: History, by: str = "epoch") -> Convergence:
    """Cross-entropy of training and validation sets by "epoch" (the last record of each) or by "update"."""
    key, x = cross_entropy_key(history), {"epoch": "epoch", "update": "num_updates"}[by]
    train = history.get(INNER, []) if by == "update" else []
    kinds = {EPOCHS: train or history.get(EPOCHS, []), **{kind: history[kind] for kind in validated_kinds(history)}}
    curves = {kind: _last_of_each(*series(records, key, x)) for kind, records in kinds.items()}
    return Convergence(key, {kind: points for kind, points in curves.items() if points[0]}, earm_entry(history, x))


def _last_of_each(xs: Sequence[float], ys: Sequence[float]) -> Points:
    last = dict(zip(xs, ys))
    return list(last), list(last.values())


def convergence(runs: Mapping[str, Sequence[Convergence]], by: str, path: PathLike, title: str = "") -> None:
    """The paper's Figure 2: a panel for each set; dotted where E-ARM enters.

    Args:
        runs: label → its seeds.
        by: what the curves go by, "epoch" or "update".
        path: PNG to write.
    """
    kinds = list(dict.fromkeys(kind for seeds in runs.values() for seed in seeds for kind in seed.curves))
    figure, axes = _figure(len(kinds))
    for axis, kind in zip(axes, kinds):
        for number, (label, seeds) in enumerate(runs.items()):
            colour = COLOURS[number % len(COLOURS)]
            _draw_runs(axis, [seed.curves.get(kind, ([], [])) for seed in seeds], label, colour)
            for entered in sorted({seed.earm for seed in seeds if seed.earm is not None}):
                axis.axvline(entered, color=colour, linewidth=1, linestyle=":")
        axis.set(title=f"{kind} set", xlabel=by)
        axis.xaxis.get_major_locator().set_params(integer=True)
        tidy(axis)
    axes[0].set_ylabel(_cross_entropy_label({seed.key for seeds in runs.values() for seed in seeds}))
    dotted = any(seed.earm is not None for seeds in runs.values() for seed in seeds)
    _legend(figure, axes, f"first {by} with E-ARM" if dotted else None)
    save(figure, path, title)


def _cross_entropy_label(keys: set) -> str:
    names = "nll_loss, or loss where it is not logged" if len(keys) > 1 else ", ".join(keys)
    return f"cross-entropy, base 2, per token\n({names})"


def _figure(panels: int):
    figure, axes = plt.subplots(1, panels, figsize=(5.2 * panels, 4.2), squeeze=False, layout="constrained")
    return figure, axes[0]


def _draw_runs(axis, runs: Sequence[Points], label: str, colour) -> None:
    runs = [(x, y) for x, y in map(drawable, runs) if x]
    mean = _mean(runs) if len(runs) > 1 else ([], [])
    few = all(len(x) <= MOST_MARKERS for x, _ in runs)
    name, style = _literally(label), {"color": colour, "marker": "." if few else None}
    for x, y in runs:
        alone = not mean[0]
        width, opacity = (1.8, 1) if alone else (0.6, 0.4)
        axis.plot(x, y, linewidth=width, alpha=opacity, label=name if alone else None, **style)
    if mean[0]:
        axis.plot(*mean, linewidth=2, label=name, **style)


def _mean(runs: Sequence[Points]) -> Points:
    """The mean wherever all runs have a value."""
    values = [dict(zip(x, y)) for x, y in runs]
    shared = sorted(set.intersection(*map(set, values)))
    return shared, [sum(value[x] for value in values) / len(values) for x in shared]


def _literally(label: str) -> str:
    """A label of which matplotlib makes no formula, and which it does not hide."""
    return ("\u200b" if label.startswith("_") else "") + label.replace("$", r"\$")


def _legend(figure, axes, dotted: Optional[str] = None) -> None:
    """Every label once, whichever panels it appears in."""
    found = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            found.setdefault(label, handle)
    if dotted:
        found[dotted] = plt.Line2D([], [], color="grey", linewidth=1, linestyle=":")
    columns = min(4, max(1, len(found)))
    figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=columns, frameon=False)


class Curve(NamedTuple):
    """One line of a panel.

    Attributes:
        points: x and y; what is not `drawable` is left out.
        colour: of its run, see `RUN_COLOURS`.
        style: matplotlib's: "-" or "--", or "o-" with its points marked.
    """

    points: Points
    colour: str
    style: str = "-"


def panel(
    curves: Sequence[Curve], ylabel: str, *, zero: bool = False, log: bool = False, limits: Optional[Tuple[float, float]] = None,
    entries: Sequence[Tuple[float, str]] = (),
) -> bytes:
    """A panel by update as SVG, to stand in a page: axes in the page's text colour, ground transparent, text as text.

    Args:
        zero: with a line at 0.
        log: with a logarithmic axis, where the values span a factor of ten.
        limits: lowest and highest value shown, if not all are.
        entries: (x, colour) of dotted vertical lines.
    """
    ink = {name: INK for name in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")}
    with plt.rc_context({**ink, "svg.fonttype": "none", "svg.hashsalt": "panel", "font.size": 9}):
        figure, axis = plt.subplots(figsize=(4.0, 2.6), layout="constrained")
        for curve in curves:
            x, y = thinned(*drawable(curve.points))
            dots = {"marker": "."} if len(x) <= MOST_MARKERS and not set(curve.style) & set("osv^") else {}
            axis.plot(x, y, curve.style, color=curve.colour, linewidth=1.4, markersize=4, **dots)
        for x, colour in entries:
            axis.axvline(x, color=colour, linewidth=1, linestyle=":")
        if zero:
            axis.axhline(0, color=INK, linewidth=0.8)
        axis.set(xlabel="update", ylabel=ylabel)
        if limits:
            axis.set_ylim(limits)
        if log and _spans_decades(curves):
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("")
        tidy(axis)
        axis.grid(alpha=0.15)
        file = io.BytesIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    return _for_pages(file.getvalue().decode()).encode()


def _spans_decades(curves: Sequence[Curve]) -> bool:
    values = [y for curve in curves for y in drawable(curve.points)[1]]
    return min(values) > 0 and max(values) > 10 * min(values)


def _for_pages(svg: str) -> str:
    """Without what only a file of its own needs: names that several pictures of a page would share, and links."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return re.sub(r'<g id="[^"]*"', "<g", svg).replace(INK, "currentColor")


def settled_range(curves: Sequence[Curve]) -> Optional[Tuple[float, float]]:
    """What all curves lie within after the first tenth of the updates; None where that is not much less than the whole."""
    points = [point for curve in curves for point in zip(*drawable(curve.points))]
    last = max(x for x, _ in points)
    early, late = ([y for x, y in points if (x >= min(last, last / 10)) == after] for after in (False, True))
    low, high = min(late), max(late)
    whole = max([*early, high]) - min([*early, low])
    margin = 0.08 * (high - low)
    return (low - margin, high + margin) if high > low and whole > 2.5 * (high - low) else None


def drawable(points: Points) -> Points:
    """The points without those that are not finite, or so large that no axis reaches them."""
    kept = [(x, y) for x, y in zip(*points) if abs(y) <= LARGEST]  # NaN is not
    return [x for x, _ in kept], [y for _, y in kept]


def thinned(xs: Sequence[float], ys: Sequence[float], most: int = MOST_POINTS) -> Points:
    """At most so many points: means over stretches of equally many, where there are more."""
    size = -(-len(xs) // most) or 1
    stretches = [(xs[i : i + size], ys[i : i + size]) for i in range(0, len(xs), size)]
    return [sum(x) / len(x) for x, _ in stretches], [sum(y) / len(y) for _, y in stretches]
