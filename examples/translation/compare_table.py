"""The table of `compare.py`: mean ± standard deviation over seeds, and differences with their bootstrap intervals."""
from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Dict, List, Optional

import numpy as np
from sacrebleu.metrics import BLEU

from steps import done, spread

from fairseq_earm.cli.tune import corpus_bleu
from fairseq_earm.errors import UsageError
from fairseq_earm.evaluation.plots import read_log

COLUMNS = ["valid_nll", "nll", "dv", "temperature", "joint_nll", "sample_length"]
TITLES = ["valid NLL", "test NLL", "DV", "β", "joint NLL", "sample length"]
RESAMPLES = 1000
Statistics = Dict[str, np.ndarray]


def generations(spec: dict) -> Dict[str, List[str]]:
    """Log name → flags of every way to translate that a spec asks for; a single one has no name of its own."""
    if isinstance(spec["generate"], dict):
        return {f"test-{name}": flags for name, flags in spec["generate"].items()}
    return {"test": spec["generate"]}


def print_table(spec: dict, output: Path, against: Optional[str] = None) -> None:
    """Print one Markdown row per branch that has results.

    Args:
        spec: what `compare.py run` was given.
        output: its output folder.
        against: branch that BLEU differences are taken to, seed by seed. Without it, the branch that each branch's own
            "against" names or, failing that, the spec's; no difference where neither does or where that one has no results.
    Raises:
        UsageError: `against` has no results; a generation's log that lacks sentences.
    """
    found = {name: {log: bleu_statistics(output / name, log) for log in generations(spec)} for name in spec["branches"]}
    found = {name: systems for name, systems in found.items() if all(systems.values())}
    if against is not None and against not in found:
        raise UsageError(f"--against {against}: no such branch with results in {output}; name one that has run")
    opponents = {name: against or spec["branches"][name].get("against", spec.get("against")) for name in found}
    opponents = {name: other if other in found else None for name, other in opponents.items()}
    print(_line(_header(spec, opponents)))
    print("|" + "---|" * len(_header(spec, opponents)))
    for name, systems in found.items():
        seeds = list(next(iter(systems.values())))
        numbers = [json.loads((output / name / seed / "measure.json").read_text()) for seed in seeds]
        cells = [name, str(len(seeds)), *(spread([one[column] for one in numbers]) for column in COLUMNS)]
        for log, system in systems.items():
            cells.append(bleu_cell(system))
            if any(opponents.values()):
                cells.append(_gain(name, opponents, found, log))
        print(_line([*cells, _seconds([output / name / seed / "train.log" for seed in seeds])]))


def _header(spec: dict, opponents: Dict[str, Optional[str]]) -> List[str]:
    titles = ["branch", "seeds", *TITLES]
    for log in generations(spec):
        titles.append(f"BLEU{log[len('test'):].replace('-', ' ', 1)}")
        if any(opponents.values()):
            titles.append(f"against {_only(opponents)}" if _only(opponents) else "against")
    return [*titles, "s/update"]


def _only(opponents: Dict[str, Optional[str]]) -> Optional[str]:
    """The branch that all others are compared with, if it is one and the same."""
    return next(iter(opponents.values())) if len(set(opponents.values())) == 1 else None


def _gain(name: str, opponents: Dict[str, Optional[str]], found: Dict[str, Dict[str, Statistics]], log: str) -> str:
    other = opponents[name]
    if other is None or other == name:
        return ""
    gain = difference(found[name][log], found[other][log])
    return gain if _only(opponents) or not gain else f"{other}: {gain}"


def _line(cells: List[str]) -> str:
    return f"| {' | '.join(cells)} |"


def bleu_statistics(folder: Path, name: str = "test") -> Statistics:
    """Seed → (S, 10) BLEU statistics of every test sentence, in the test set's order, from the finished seed*/NAME.log."""
    logs = [log for log in sorted(folder.glob(f"seed*/{name}.log")) if done(log)]
    return {log.parent.name: sentence_statistics(log.read_text()) for log in logs}


def bleu_cell(seeds: Statistics) -> str:
    """BLEU over the seeds."""
    return spread([corpus_bleu(rows.sum(0)) for rows in seeds.values()], 2)


def sentence_statistics(text: str) -> np.ndarray:
    """Statistics of each sentence's first D-line against its T-line."""
    references, hypotheses = {}, {}
    for kind, number, rest in re.findall(r"^([TD])-(\d+)\t(.*)$", text, flags=re.MULTILINE):
        if kind == "T":
            references[int(number)] = rest
        else:
            hypotheses.setdefault(int(number), rest.split("\t", 1)[1])
    if references.keys() != hypotheses.keys():
        raise SystemExit("not every sentence was translated")
    metric = BLEU(tokenize="none", effective_order=True)
    scores = [metric.sentence_score(hypotheses[i], [references[i]]) for i in sorted(references)]
    return np.array([[s.sys_len, s.ref_len, *s.counts, *s.totals] for s in scores])


def difference(seeds: Statistics, reference: Statistics) -> str:
    """Mean BLEU difference over the seeds both have, its 95 % interval over test sentences, and p (two-sided).

    Sentences are drawn anew for all seeds together, so that the interval is that of the mean over these seeds.
    """
    shared = [seed for seed in seeds if seed in reference]
    if not shared:
        return ""
    generator = np.random.default_rng(1)
    count = len(seeds[shared[0]])

    def gain(rows) -> float:
        return statistics.mean(corpus_bleu(seeds[s][rows].sum(0)) - corpus_bleu(reference[s][rows].sum(0)) for s in shared)

    drawn = np.array([gain(generator.integers(count, size=count)) for _ in range(RESAMPLES)])
    low, high = np.percentile(drawn, [2.5, 97.5])
    p = min(1.0, 2 * min((drawn <= 0).mean(), (drawn >= 0).mean()))
    return f"{gain(np.arange(count)):+.2f} [{low:+.2f}, {high:+.2f}], p = {p:.2f}"


def _seconds(logs: List[Path]) -> str:
    return spread([update_seconds(log) for log in logs], 2)


def update_seconds(log: Path) -> float:
    """Median seconds per update over the log's intervals."""
    return statistics.median(1 / float(record["ups"]) for record in read_log(log)["train_inner"] if float(record["ups"]) > 0)
