"""From a run's files to its table, its figures and what the numbers support, in words."""
from __future__ import annotations

import json
import math
import re
import statistics
import sys
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import language  # noqa: E402
import settings  # noqa: E402
from verdict import verdicts  # noqa: E402

# model → metric → one value per seed
Results = Dict[str, Dict[str, List[float]]]


class Metric(NamedTuple):
    """One line of the table: key in the results, what it is, digits after the point."""

    key: str
    title: str
    digits: int


METRICS = [
    Metric("valid_nll", "valid NLL of q", 3),
    Metric("nll", "test NLL of q", 3),
    Metric("kl", "KL(true, q)", 3),
    Metric("joint_nll", "test joint NLL, upper", 3),
    Metric("joint_nll_lower", "test joint NLL, lower", 3),
    Metric("temperature", "fitted temperature", 2),
    Metric("dv", "DV bound", 3),
    Metric("dv_per_source", "DV bound, per source", 3),
    Metric("ess", "ESS share of weights", 2),
    Metric("bleu_greedy", "BLEU greedy", 2),
    Metric("bleu_beam", "BLEU beam", 2),
    Metric("bleu_reranked", "BLEU beam, reranked", 2),
    Metric("in_language", "in language: samples", 3),
    Metric("in_language_resampled", "in language: resampled", 3),
    Metric("sample_length", "mean length of samples", 2),
    Metric("seconds_per_update", "seconds per update", 3),
]


def titles(size: settings.Size) -> Dict[str, str]:
    """Model → its column's title, in the table's order."""
    return {"base": "base", **{key: settings.BRANCHES[key].title for key in size.branches}}


def collect(output: Path, size: settings.Size) -> Results:
    """Read every model's numbers from its files."""
    results: Results = {}
    for name in titles(size):
        rows = [model_numbers(output / "runs" / f"seed{seed}" / name, size) for seed in size.seeds]
        results[name] = {key: [row[key] for row in rows] for key in rows[0]}
    return results


def model_numbers(folder: Path, size: settings.Size) -> Dict[str, float]:
    """All numbers of one model of one seed."""
    measured = json.loads((folder / "measure.json").read_text())
    numbers = {key: value for key, value in measured.items() if isinstance(value, (int, float))}
    numbers["ess"] = statistics.mean(measured["ess_share"])
    for log in sorted(folder.glob("generate-*.log")):
        numbers[log.stem.replace("generate-", "bleu_")] = bleu(log, size.test)
    resampled = folder / "generate-resampled.log"
    if resampled.exists():
        inside = [language.is_translation(source, output) for source, output in translations(resampled, size.test)]
        numbers["in_language_resampled"] = statistics.mean(inside)
    numbers["seconds_per_update"] = seconds_per_update(folder / "train.log")
    return numbers


def bleu(log: Path, sentences: int) -> float:
    """The score at the end of a log of fairseq-generate."""
    translations(log, sentences)
    return float(re.findall(r"BLEU4? = ([\d.]+)", log.read_text())[-1])


def translations(log: Path, sentences: int) -> List[tuple]:
    """(source, first output) of every sentence of a log of fairseq-generate; fails where a sentence is missing."""
    found: Dict[str, Dict[str, tuple]] = {"S": {}, "H": {}}
    for line in log.read_text().splitlines():
        match = re.match(r"([SH])-(\d+)\t", line)
        if match:
            found[match.group(1)].setdefault(match.group(2), tuple(line.split("\t")[-1].split()))
    if len(found["H"]) != sentences:
        raise RuntimeError(f"{log}: {sentences} sentences went in, {len(found['H'])} came out")
    return [(found["S"][number], output) for number, output in found["H"].items()]


def seconds_per_update(log: Path) -> float:
    """Median over the log's intervals, which leaves out the ones that hold a validation or the start."""
    from fairseq_earm.evaluation.training_log import read_log

    records = read_log(log)
    inner = [1 / r["ups"] for r in records.get("train_inner", []) if r.get("ups")]
    whole = [r["wall"] / r["num_updates"] for r in records.get("train", [])]
    return statistics.median(inner or whole)


def spread(values: Sequence[float]) -> float:
    """Standard deviation over seeds, 0 for one seed."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def table(results: Results, size: settings.Size) -> str:
    """Metrics down, models across; mean ± standard deviation over seeds."""
    # A title's part after the comma goes on a second line.
    heads = [title.partition(", ")[::2] for title in titles(size).values()]
    lines = [["", *(first for first, _ in heads)], ["", *(second for _, second in heads)]]
    for metric in METRICS:
        lines.append([metric.title, *(cell(results[name].get(metric.key), metric.digits) for name in titles(size))])
    widths = [max(map(len, column)) for column in zip(*lines)]
    first, second, *rest = [align(line, widths) for line in lines]
    return "\n".join([first, second, "-" * sum(widths, 2 * len(heads)), *rest])


def align(cells: Sequence[str], widths: Sequence[int]) -> str:
    """One line: the first cell to the left, the others to the right."""
    padded = [cell.rjust(width) for cell, width in zip(cells, widths)]
    return "  ".join([cells[0].ljust(widths[0]), *padded[1:]]).rstrip()


def cell(values: Optional[Sequence[float]], digits: int) -> str:
    """Mean ± standard deviation; a dash for what was not measured."""
    if values is None:
        return "-"
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ±{spread(values):.{digits}f}" if len(values) > 1 else mean


def grid_table(rows: Sequence[dict]) -> str:
    """The learning rates' grid as a Markdown table; each branch's best joint NLL on validation data is marked."""
    lines = ["| branch | learning rate | valid NLL of q | valid joint NLL | valid DV | temperature |", "|---|---|---|---|---|---|"]
    for row in rows:
        best = min(r["valid_joint_nll"] for r in rows if r["branch"] == row["branch"])
        mark = "**" if row["valid_joint_nll"] == best else ""
        lines.append(
            f"| {settings.BRANCHES[row['branch']].title} | {row['learning_rate']:g} | {row['valid_nll']:.3f} | "
            f"{mark}{row['valid_joint_nll']:.3f}{mark} | {row['valid_dv']:+.3f} | {row['temperature']:.2f} |"
        )
    return "\n".join(lines)


def draw(output: Path, size: settings.Size) -> List[Path]:
    """Figures of training, energies and weights."""
    from fairseq_earm.evaluation import curves, plots

    folders = {title: [output / "runs" / f"seed{s}" / name for s in size.seeds] for name, title in titles(size).items()}
    branches = {title: [f / "train.log" for f in found] for title, found in folders.items() if title != "base"}
    first = {title: json.loads((found[0] / "measure.json").read_text()) for title, found in folders.items()}
    files = [output / name for name in ("training.png", "training-base.png", "energies.png", "weights.png")]
    valid = ("valid", "nll_loss", "valid NLL of q (bits per token)")
    panels = [valid, ("train_inner", "earm_dv", "DV bound on training batches (nats)")]
    curves.training_curves(branches, [*panels, ("train_inner", "earm_ess", "ESS share of weights")], files[0], "Branches")
    base = {"base": [f / "train.log" for f in folders["base"]]}
    curves.training_curves(base, [("train_inner", "loss", "training loss (bits per token)"), valid], files[1], "Base models")
    energies = {title: (m["energies_data"], m["energies_samples"]) for title, m in first.items()}
    shown = ["base", *(settings.BRANCHES[key].title for key in size.branches if settings.BRANCHES[key].controls)]
    plots.energy_histograms({t: energies[t] for t in shown}, files[2], f"Energies on test data, seed {size.seeds[0]}")
    shares = {title: m["ess_share"] for title, m in first.items()}
    plots.effective_sample_sizes(shares, size.samples, files[3], "Weights of samples")
    return files


def write(output: Path, size: settings.Size, seconds: float) -> None:
    """Print table and verdicts; write them, all numbers and the figures into the output folder."""
    results = collect(output, size)
    text = [
        table(results, size),
        "",
        f"Nats per sentence where no other unit is given; mean ± standard deviation over {len(size.seeds)} seed(s); BLEU by sacrebleu.",
        f"The true distribution has test NLL {results['base']['true_nll'][0]:.3f}, entropy {results['base']['entropy'][0]:.3f}; "
        f"the data's mean length is {results['base']['data_length'][0]:.2f}.",
        "",
        *verdicts(results),
    ]
    (output / "report.txt").write_text("\n".join(text) + "\n")
    numbers = {"size": size._asdict(), "seconds": seconds, "results": results}
    (output / "results.json").write_text(json.dumps(numbers, indent=1))
    files = draw(output, size)
    print("\n" + "\n".join(text))
    print(f"\n{math.ceil(seconds)} seconds. Written: report.txt, results.json, {', '.join(f.name for f in files)} in {output}")
