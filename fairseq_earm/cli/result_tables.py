"""Tables of what the package's commands wrote with --json; each kind of file is known by its keys."""
from __future__ import annotations

from typing import Callable, Dict, List, Optional

from fairseq_earm.cli import evaluate
from fairseq_earm.evaluation.score_tables import Table


def result_tables(report: object) -> Optional[List[Table]]:
    """The tables of a report; None if none of the package's commands wrote it."""
    for keys, tables in KINDS.items():
        if isinstance(report, dict) and set(keys) <= report.keys():
            try:
                return tables(report)
            except Exception:  # whatever stands in a file that has these keys by chance
                return None
    return None


def _perplexity(report: dict) -> List[Table]:
    base = f"{report['base']['perplexity']:.2f}"
    rows = [["base", "", base, base, ""]]
    for row in report.get("joint", []):
        error = row["gain_standard_error"]
        gain = f"{row['gain']:+.4f}" + ("" if error is None else f" ± {error:.4f}")
        rows.append(["joint", f"{row['samples']:,}", f"{row['perplexity_lower']:.2f}", f"{row['perplexity_upper']:.2f}", gain])
    title = f"Perplexity per token: {report['sequences']:,} sequences, {report['tokens']:,} tokens. {report['conditions']}"
    if len(rows) > 1:
        tables = [Table(title, ["", "samples", "lower bound", "upper bound", "gain, nats ± standard error"], rows)]
    else:
        tables = [Table(title, ["", "perplexity"], [["base", base]])]
    if "steps" in report:
        names = [name for name in ("base", "lower", "upper") if name in report["steps"][0]]
        steps = [[str(row["step"]), *(f"{row[name]:.2f}" for name in names)] for row in report["steps"]]
        tables.append(Table("Perplexity at each step", ["step", *names], steps))
    return tables


def _tuned(report: dict) -> List[Table]:
    rows = [
        [f"{row['energy_weight']:g}", f"{row['lenpen']:g}", f"{row['bleu']:.2f}", _span(row["interval"], ".2f"), f"{row['gain']:+.2f}",
         _span(row["gain_interval"], "+.2f")]
        for row in report["settings"]
    ]
    how = f"{report['sentences']:,} sentences, sacreBLEU tok:{report['sacrebleu_tokenize']}"
    title = f"BLEU by energy weight, each with its best length penalty: {how}"
    return [Table(title, ["--energy-weight", "best --lenpen", "BLEU", "95 % interval", "gain", "95 % interval, paired"], rows)]


def _exposure_bias(report: dict) -> List[Table]:
    rows = []
    for measure, better in (("probability", "likelier under A"), ("rank", "of better rank under A")):
        for context, name in (("own", "own contexts"), ("reference", "the reference as context")):
            row = report[measure][context]
            counts = [f"{row[key]:,}" for key in ("greater", "less", "ties")]
            rows.append([f"{better}, {name}", *counts, *_ratio(row, ".4f")])
        rows.append([f"{better}, difference", "", "", "", *_ratio(report[measure]["difference"], "+.4f")])
    models = report.get("settings", {})
    which = f" A: {models['a']}. B: {models['b']}." if {"a", "b"} <= models.keys() else ""
    title = f"Exposure bias: reference words of {report['pairs']:,} pairs; 0.5 is equality, ties are left out.{which}"
    return [Table(title, ["words", "A", "B", "ties", "ratio", "95 % interval"], rows)]


def _ratio(row: dict, form: str) -> List[str]:
    """A ratio and its interval; where all words are tied there is none."""
    return ["-", "-"] if row["ratio"] is None else [format(row["ratio"], form), _span(row["interval"], form)]


def _span(interval, form: str) -> str:
    return f"[{', '.join(format(value, form) for value in interval)}]"


KINDS: Dict[tuple, Callable[[dict], List[Table]]] = {
    ("systems", "signatures", "sentences"): evaluate.tables,
    ("probability", "rank", "not_reached"): _exposure_bias,
    ("conditions", "base", "tokens", "sequences"): _perplexity,
    ("best", "settings", "sacrebleu_tokenize"): _tuned,
}
