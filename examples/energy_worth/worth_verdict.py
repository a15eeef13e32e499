"""The tables of results/: every branch against the best control, with intervals over seeds and sentences.

worth_verdict.py [CORPUS ...]
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional

import numpy as np
from scipy import stats
from tabulate import tabulate

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from steps import spread  # noqa: E402
from worth_plan import BRANCHES, CONTROLS, CORPORA, Corpus  # noqa: E402

TUNED_ONLY = ["branch, tuned and not judged", "rate", "validation joint NLL, tuning seeds"]


class Difference(NamedTuple):
    """Mean difference of a branch to the best control, nats per sentence; half of its 95 % interval; two-sided p."""

    mean: float
    half: float
    p: float


def finished(results: Path) -> List[dict]:
    """What the branches of a corpus left, one dictionary each."""
    return [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]


def best_rates(corpus: Corpus, rows: List[dict]) -> Dict[str, tuple]:
    """(validation joint NLL, rate) of each tuned branch at its best rate by the mean of the tuning seeds."""
    by_rate: Dict[tuple, Dict[int, float]] = {}
    for row in rows:
        if row["seed"] in corpus.tuning_seeds:
            by_rate.setdefault((row["branch"], row["rate"]), {})[row["seed"]] = row["valid_joint_nll"]
    best: Dict[str, tuple] = {}
    for (branch, rate), found in by_rate.items():
        if len(found) == len(corpus.tuning_seeds):
            best[branch] = min(best.get(branch, (float("inf"), rate)), (statistics.mean(found.values()), rate))
    return best


def best_control(best: Dict[str, tuple]) -> Optional[str]:
    """The control with the lowest joint NLL of validation data at as many updates as the energies have."""
    names = [name for name in best if name in CONTROLS and BRANCHES[name].updates == 1]
    return min(names, key=lambda name: best[name], default=None)


def difference(ours: List[dict], theirs: List[dict], key: str) -> Optional[Difference]:
    """Paired by seed and sentence. Seeds and sentences are both samples: their variances add up (Welch-Satterthwaite).

    Args:
        ours, theirs: results of two branches.
        key: of `sentences`.
    """
    pairs = [(a, b) for a in ours for b in theirs if a["seed"] == b["seed"] and "sentences" in a and "sentences" in b]
    if len(pairs) < 2:
        return None
    found = np.array([np.subtract(a["sentences"][key], b["sentences"][key]) for a, b in pairs])
    parts = [(found.mean(1).var(ddof=1), len(pairs)), (found.mean(0).var(ddof=1), found.shape[1])]
    variance = sum(each / count for each, count in parts)
    freedom = variance**2 / sum((each / count) ** 2 / (count - 1) for each, count in parts)
    mean, error = float(found.mean()), float(np.sqrt(variance))
    return Difference(
        mean, float(stats.t.ppf(0.975, freedom)) * error, float(2 * stats.t.sf(abs(mean) / error, freedom))
    )


def holm(p_values: List[float]) -> List[float]:
    """Holm's step-down correction: p-values that hold for all of the comparisons together."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        corrected[index] = largest
    return corrected


def corpus_table(name: str, results: Path) -> str:
    """Tuning and, where there are fresh seeds, the verdict of one corpus, as Markdown."""
    corpus, rows = CORPORA[name], finished(results / name)
    best = best_rates(corpus, rows)
    control = best_control(best)
    fresh = {
        branch: [
            row for row in rows if row["branch"] == branch and row["rate"] == rate and row["seed"] in corpus.fresh_seeds
        ]
        for branch, (_, rate) in best.items()
    }
    kinds = {"joint NLL": "joint_nll", "NLL": "nll"}
    found = {
        (branch, kind): difference(fresh[branch], fresh[control], key)
        for branch in best
        if branch != control and control
        for kind, key in kinds.items()
    }
    compared = [key for key, each in found.items() if each is not None and key[0] not in CONTROLS]
    corrected = dict(zip(compared, holm([found[key].p for key in compared])))
    judged = [branch for branch in corpus.branches if fresh.get(branch)]
    lines = []
    for branch in judged:
        line = [branch + (" (best control)" if branch == control else ""), f"{best[branch][1]:g}", len(fresh[branch])]
        line += [_spread(fresh[branch], key) for key in ("nll", "joint_nll", "dv", "training_dv")]
        line += [_shown(found.get((branch, kind)), corrected.get((branch, kind))) for kind in kinds]
        lines.append(line + ([_spread(fresh[branch], "bleu", 2)] if corpus.generate else []))
    headers = ["branch", "rate", "seeds", "test NLL", "test joint NLL", "test DV", "training DV"]
    headers += [f"{kind} − best control's" for kind in kinds] + (["BLEU"] if corpus.generate else [])
    tuned = [[branch, f"{rate:g}", f"{nll:.3f}"] for branch, (nll, rate) in best.items() if branch not in judged]
    return "\n\n".join(
        tabulate(*table, tablefmt="pipe", disable_numparse=True)
        for table in ((lines, headers), (sorted(tuned, key=lambda line: line[2]), TUNED_ONLY))
        if table[0]
    )


def _spread(rows: List[dict], key: str, digits: int = 3) -> str:
    return spread([row[key] for row in rows if row.get(key) is not None], digits)


def _shown(found: Optional[Difference], corrected: Optional[float]) -> str:
    if found is None:
        return ""
    p = "" if corrected is None else f", p = {corrected:.2g}"
    return f"{found.mean:+.3f} ± {found.half:.3f}{p}"


def main() -> None:
    names = sys.argv[1:] or [name for name in CORPORA if (HERE / "results" / name).exists()]
    for name in names:
        print(f"### {name}\n\n{corpus_table(name, HERE / 'results')}\n")


if __name__ == "__main__":
    main()
