"""From the demonstration's files to its table, its picture and what the numbers support, in words."""
from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Dict, List, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import anagrams  # noqa: E402
import residual_settings as settings  # noqa: E402
from fairseq_earm.evaluation.plots import COLOURS, plt  # noqa: E402

TOKENS = settings.LENGTH - settings.PREFIX


class Found(NamedTuple):
    """The numbers of one energy and one seed.

    Attributes:
        halves: figures of each enumerated first half, see `residual_measure.Enumeration`.
        perplexity: what fairseq-earm-perplexity wrote.
        anagrams: share of the joint samples that say the first half again.
        points: (optimal, learnt) energies of one first half.
    """

    halves: List[dict]
    perplexity: dict
    anagrams: float
    points: list

    def mean(self, key: str) -> float:
        return statistics.fmean(half[key] for half in self.halves)


def share_of_anagrams(log: str) -> float:
    """Among the hypotheses that fairseq-generate printed, given the first halves it printed."""
    lines = [line.split("\t") for line in log.splitlines() if line[:2] in ("S-", "T-", "H-")]
    text = {line[0]: line[-1].split() for line in lines}
    numbers = [name[2:] for name in text if name.startswith("H-")]
    said = [(text[f"S-{n}"][: anagrams.HALF], text[f"H-{n}"][-anagrams.HALF:]) for n in numbers]
    return sum(anagrams.says_again(first, second) for first, second in said) / len(said)


def collect(output: Path, size: settings.Size) -> Dict[str, List[Found]]:
    """Energy → its numbers, one entry per seed."""

    def found(name: str) -> Found:
        exact = json.loads((output / f"{name}.exact.json").read_text())
        perplexity = json.loads((output / f"{name}.perplexity.json").read_text())
        return Found(exact["halves"], perplexity, share_of_anagrams((output / f"{name}.samples.log").read_text()), exact["points"])

    return {name: [found(f"{name}-{seed}") for seed in size.seeds] for name in settings.ENERGIES}


def table(results: Dict[str, List[Found]], base_anagrams: float, data_anagrams: float) -> str:
    """A row for each figure; the joint models' with mean ± standard deviation over seeds."""
    first = next(iter(results.values()))[0]
    truth, base = first.mean("entropy"), first.mean("entropy") + first.mean("kl_base")

    def row(title: str, data: str, base_value: str, value=None) -> str:
        joint = ["" if value is None else _spread([value(f) for f in found]) for found in results.values()]
        return "| " + " | ".join([title, data, base_value, *joint]) + " |"

    rows = [
        "| | data | base | " + " | ".join(f"joint {name.upper()}" for name in results) + " |",
        "|---|" + "---|" * (2 + len(results)),
        row("perplexity per token, exact", _number(_perplexity(truth)), _number(_perplexity(base)),
            lambda f: _perplexity(f.mean("entropy") + f.mean("kl_joint"))),
        row("KL(data, model), nats per continuation, exact", "0", _number(first.mean("kl_base")), lambda f: f.mean("kl_joint")),
        row("perplexity on test lines, lower estimate", "", _number(first.perplexity["base"]["perplexity"]),
            lambda f: f.perplexity["joint"][-1]["perplexity_lower"]),
        row("perplexity on test lines, upper estimate", "", "", lambda f: f.perplexity["joint"][-1]["perplexity_upper"]),
        row("probability of strings of the language's words", "1", f"{first.mean('base_covers'):.4f}"),
        row("log Z, exact mean (0 at the optimum)", "0", "", lambda f: f.mean("log_z")),
        row("correlation with the optimal energy", "1", "", lambda f: f.mean("correlation")),
        row("deviation from the optimal energy, nats", "0", _number(first.mean("deviation_of_zero")), lambda f: f.mean("deviation")),
        row("second halves that say the first again", _number(data_anagrams), _number(base_anagrams), lambda f: f.anagrams),
    ]
    return "\n".join(rows)


def _perplexity(nll: float) -> float:
    """Per token of a continuation, end-of-line included."""
    return math.exp(nll / TOKENS)


def _number(value: float) -> str:
    return f"{value:.3f}"


def _spread(values: List[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def verdict(results: Dict[str, List[Found]]) -> List[str]:
    """What the numbers support, a line for each energy."""
    lines = []
    for name, found in results.items():
        closed = [1 - f.mean("kl_joint") / f.mean("kl_base") for f in found]
        worst = min(closed)
        verb = f"closes {_percent(statistics.fmean(closed))} of the gap between base and data" if worst > 0 else "does not improve on its base in every seed"
        log_z = max(abs(f.mean("log_z")) for f in found)
        lines.append(f"{name.upper()} {verb} (in KL, worst seed {_percent(worst)}); its log Z is within {log_z:.3f} of the optimum's 0.")
    return lines


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def draw(results: Dict[str, List[Found]], path: Path) -> None:
    """Learnt against optimal energy for the likely continuations of one first half; one seed of each network."""
    figure, axes = plt.subplots(1, len(results), figsize=(5 * len(results), 4.5), squeeze=False, sharex=True, sharey=True)
    for axis, (name, found), colour in zip(axes[0], results.items(), COLOURS):
        optimal, learnt = zip(*found[0].points)
        axis.plot(optimal, learnt, ".", color=colour, markersize=4)
        ends = [min(optimal), max(optimal)]
        axis.plot(ends, ends, color="0.4", linewidth=1)
        axis.set_title(f"joint {name.upper()}")
        axis.set_xlabel("optimal energy, log P_LM − log P_data (nats)")
    axes[0][0].set_ylabel("learnt energy + log Z (nats)")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write(output: Path, size: settings.Size) -> None:
    """Print the table and the verdict, and write them and the picture."""
    results = collect(output, size)
    base = share_of_anagrams((output / "base.samples.log").read_text())
    lines = [line.split() for line in (output / "text" / "test.txt").read_text().splitlines()]
    data = statistics.fmean(anagrams.says_again(line[: anagrams.HALF], line[anagrams.HALF:]) for line in lines)
    draw(results, output / "energies.png")
    text = "\n".join([table(results, base, data), "", *verdict(results)])
    (output / "table.md").write_text(text + "\n")
    print(text)
