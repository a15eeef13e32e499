"""The figure of `evaluation.exposure_bias`; PNG."""
from __future__ import annotations

from typing import Mapping, Sequence

from fairseq_earm.evaluation.plots import PathLike, plt, save, tidy

# Okabe and Ito's colours, which colour-blind people tell apart; each with a line and a marker of its own.
CONTEXTS = {"own": ("the models' own contexts", "#0072B2", "-", "o"), "reference": ("the reference as context", "#E69F00", "--", "s")}


def ratios_by_position(positions: Sequence[Mapping], path: PathLike, title: str = "") -> None:
    """Share of words that are likelier under A at each place in the sentence, with 95 % intervals; the line is equality.

    Args:
        positions: `by_position` of `exposure_bias.summarize`.
        path: PNG to write.
    """
    figure, axis = plt.subplots(figsize=(6.8, 4.2), layout="constrained")
    for shift, (context, (label, colour, line, marker)) in zip((-0.12, 0.12), CONTEXTS.items()):
        places = [row["position"] + shift for row in positions]
        ratios = [row[context]["ratio"] for row in positions]
        bounds = [[abs(row[context]["interval"][side] - row[context]["ratio"]) for row in positions] for side in (0, 1)]
        axis.errorbar(places, ratios, bounds, color=colour, linestyle=line, marker=marker, markersize=4, linewidth=1.4, label=label)
    axis.axhline(0.5, color="black", linewidth=0.8)
    axis.set(xlabel="word of the reference", ylabel="share likelier under A, 95 % intervals")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(frameon=False)
    tidy(axis)
    save(figure, path, title)
