"""The table of `compare.py`: mean ± standard deviation over seeds, and differences with their bootstrap intervals."""
from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Dict, List, Optional, Sequence

import numpy as np

from steps import done, spread

from fairseq_earm.errors import UsageError
from fairseq_earm.evaluation.generated import read_generated
from fairseq_earm.evaluation.training_log import read_log
from fairseq_earm.evaluation.significance import paired_bootstrap
from fairseq_earm.evaluation.text_scores import bleu_statistics, corpus_bleu

COLUMNS = ["valid_nll", "nll", "dv", "temperature", "joint_nll", "sample_length"]
TITLES = ["valid NLL", "test NLL", "DV", "β", "joint NLL", "sample length"]
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
        UsageError: no results, or none of `against`; a generation's log that lacks sentences.
    """
    found = {name: finished(output / name, list(generations(spec))) for name in spec["branches"]}
    found = {name: systems for name, systems in found.items() if systems}
    if not found:
        raise UsageError(f"{output} has no results of this spec's branches: `compare.py run` comes first")
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
        seconds = [value for seed in seeds for value in update_seconds(output / name / seed / "train.log")]
        print(_line([*cells, spread(seconds, 2)]))


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


def finished(folder: Path, logs: Sequence[str]) -> Dict[str, Statistics]:
    """Log name → BLEU statistics of the seeds whose logs are all finished; empty where no seed has them."""
    systems = {log: bleu_of_seeds(folder, log) for log in logs}
    seeds = [seed for seed in systems[logs[0]] if all(seed in system for system in systems.values())]
    return {log: {seed: system[seed] for seed in seeds} for log, system in systems.items()} if seeds else {}


def bleu_of_seeds(folder: Path, name: str = "test") -> Statistics:
    """Seed → (S, 10) BLEU statistics of every test sentence, in the test set's order, from the finished seed*/NAME.log."""
    logs = [log for log in sorted(folder.glob(f"seed*/{name}.log")) if done(log)]
    return {log.parent.name: sentence_statistics(log) for log in logs}


def bleu_cell(seeds: Statistics) -> str:
    """BLEU over the seeds."""
    return spread([corpus_bleu(rows.sum(0)) for rows in seeds.values()], 2)


def sentence_statistics(log: Path) -> np.ndarray:
    """(S, 10) statistics of each sentence's translation against its reference, on the text as it is tokenised."""
    found = read_generated(str(log))
    if found.references is None:
        raise UsageError(f"{log} holds no references (T-lines): generate from data with a target side")
    return bleu_statistics(found.detokenised, [found.references], "none")


def difference(seeds: Statistics, reference: Statistics) -> str:
    """Mean BLEU difference over the seeds both have, its 95 % interval over test sentences, and p (two-sided)."""
    shared = [seed for seed in seeds if seed in reference]
    if not shared:
        return ""
    gain = paired_bootstrap([seeds[seed] for seed in shared], [reference[seed] for seed in shared], corpus_bleu)
    return f"{gain.difference:+.2f} [{gain.low:+.2f}, {gain.high:+.2f}], p = {gain.p_value:.2f}"


def update_seconds(log: Path) -> List[float]:
    """The median of seconds per update over the log's intervals; none where it has none, as after a kill at the very end."""
    rates = [float(record["ups"]) for record in read_log(log).get("train_inner", [])]
    return [statistics.median(1 / rate for rate in rates if rate > 0)] if any(rates) else []
