"""How sampler and update grow with length, vocabulary, batch and negatives, one at a time; with a plot."""
from __future__ import annotations

from pathlib import Path
from typing import Dict, List, Optional, Sequence

import rivals
import torch
from models import sources, translation_model
from tables import Row, Setting, Table
from timing import compare, machine
from update import AS_LONG_AS_THE_SOURCE, CROSS_ENTROPY, EARM, precision, update

from fairseq_earm.sampling.ancestral import AncestralSampler

BASE = {"length": 20, "vocabulary": 10000, "batch": 32, "negatives": 1}
QUICK = {"length": [10, 20, 40], "vocabulary": [5000, 10000, 20000], "batch": [8, 32, 128], "negatives": [1, 2, 4]}
FULL = {
    "length": [10, 20, 40, 80, 160], "vocabulary": [5000, 10000, 20000, 40000], "batch": [8, 32, 128, 512], "negatives": [1, 2, 4, 8],
}

MEANING = {
    "length": "tokens of a sentence", "vocabulary": "symbols of the vocabulary", "batch": "source sentences",
    "negatives": "negatives of each source",
}


def rows(setting: Setting, size: str = "small", grows: Dict[str, Sequence[int]] = QUICK, base: Optional[Dict[str, int]] = None) -> List[Row]:
    """Seconds of a draw and of an update beside fairseq's, each thing growing while the others stay at `base`.

    Args:
        size: of `models.translation_model`.
        grows: what grows, and the values that it takes.
        base: tokens of a sentence, symbols of the vocabulary, source sentences and negatives of each.
    """
    base = BASE if base is None else base
    return [
        {"grows": name, "value": value, **_costs(setting, size, **{**base, name: value})} for name, values in grows.items() for value in values
    ]


def _costs(setting: Setting, size: str, length: int, vocabulary: int, batch: int, negatives: int) -> Row:
    torch.manual_seed(1)
    model = setting.place(translation_model(size, vocabulary))
    net_input = sources(model, batch, length)
    repeated = {key: value.repeat_interleave(negatives, 0) for key, value in net_input.items()}
    sampler = AncestralSampler(model.decoder.dictionary, max_len_a=0, max_len_b=length)
    drawn = compare(
        {
            "fairseq": rivals.fairseqs_generator(model, repeated, length),
            "E-ARM": lambda: int(sampler(model, net_input, negatives).mask.sum()),
        },
        setting.rounds,
    )
    flags = [*EARM, "--earm-negatives", str(negatives), *AS_LONG_AS_THE_SOURCE]
    updates = {
        name: update(size, vocabulary, batch * length, criterion, length=length, precision=precision(setting))
        for name, criterion in (("fairseq", CROSS_ENTROPY), ("E-ARM", flags))
    }
    updated = compare(updates, setting.rounds)
    found: Row = {}
    for what, costs in (("sampling", drawn), ("update", updated)):
        for name, cost in costs.items():
            found[f"{what}, {name}"] = cost.seconds
            found[f"{what}, {name}, MB"] = cost.megabytes
        found[f"{what}, ratio"] = costs["E-ARM"].seconds / costs["fairseq"].seconds
    return found


def plot(found: List[Row], path: Path) -> None:
    """Seconds over each thing that grows, on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["grows"] for row in found))
    figure, panels = pyplot.subplots(1, len(names), figsize=(3 * len(names), 3.8), sharey=True, squeeze=False, layout="constrained")
    for panel, name in zip(panels[0], names):
        _panel(panel, name, [row for row in found if row["grows"] == name])
    panels[0][0].set_ylabel("seconds")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(machine(), fontsize="small")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _panel(panel, name: str, points: List[Row]) -> None:
    values = [row["value"] for row in points]
    for what, colour in (("sampling", "tab:blue"), ("update", "tab:orange")):
        for who, style in (("fairseq", "--"), ("E-ARM", "-")):
            panel.plot(values, [row[f"{what}, {who}"] for row in points], style, marker="o", color=colour, label=f"{what}, {who}")
    panel.set(xscale="log", yscale="log", xlabel=MEANING[name])
    panel.set_xticks(values, [f"{value:,}" for value in values])
    panel.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)


TABLE = Table(
    "Growth",
    {
        "grows": "", "value": ",",
        **{f"{what}, {part}": form for what in ("sampling", "update") for part, form in (
            ("fairseq", ".3f"), ("E-ARM", ".3f"), ("ratio", ".2f"), ("fairseq, MB", ",.0f"), ("E-ARM, MB", ",.0f")
        )},
    },
    rows, {"grows": QUICK}, {"grows": FULL}, plot,
)
