"""The figure of `evaluation.exposure_bias`; PNG."""
from __future__ import annotations

from typing import Mapping, Sequence

from fairseq_earm.evaluation.plots import PathLike, plt, save, tidy

# Okabe and Ito's colours, which colour-blind people tell apart; each with a line and a marker of its own.
CONTEXTS = {
    "own": ("the models' own contexts", "#0072B2", "-", "o"), "reference": ("the reference as context", "#E69F00", "--", "s"),
}


def ratios_by_position(positions: Sequence[Mapping], path: PathLike, title: str = "") -> None:
    """Share of words that are better under A at each place in the sentence, with 95 % intervals; the line is equality.

    Args:
        positions: `by_position` of `exposure_bias.summarize`.
        path: PNG to write.
    """
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for axis, (measure, name) in zip(axes, (("probability", "likelier under A"), ("rank", "of better rank under A"))):
        for shift, context in zip((-0.12, 0.12), CONTEXTS):
            points = [(row["position"] + shift, row[measure][context]) for row in positions]
            _draw(axis, [(place, row) for place, row in points if row["ratio"] is not None], *CONTEXTS[context])
        axis.axhline(0.5, color="black", linewidth=0.8)
        axis.set(xlabel="word of the reference", title=name)
        axis.xaxis.get_major_locator().set_params(integer=True)
        tidy(axis)
    axes[0].set_ylabel("share of words without ties, 95 % intervals")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    save(figure, path, title)


def _draw(axis, points: Sequence[tuple], label: str, colour: str, line: str, marker: str) -> None:
    ratios = [row["ratio"] for _, row in points]
    bounds = [[abs(row["interval"][side] - row["ratio"]) for _, row in points] for side in (0, 1)]
    style = {"color": colour, "linestyle": line, "marker": marker, "markersize": 4, "linewidth": 1.4}
    axis.errorbar([place for place, _ in points], ratios, bounds, label=label, **style)
