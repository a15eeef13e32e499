"""The table of `compare.py`: mean ± standard deviation over seeds, and differences with their bootstrap intervals."""
from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Dict

import numpy as np
from sacrebleu.metrics import BLEU

from steps import spread

from fairseq_earm.cli.tune import corpus_bleu
from fairseq_earm.evaluation.plots import read_log

COLUMNS = ["valid_nll", "nll", "dv", "temperature", "joint_nll", "sample_length"]
RESAMPLES = 1000


def print_table(spec: dict, output: Path, against: str) -> None:
    """Print one Markdown row per branch that has results.

    Args:
        spec: what `compare.py run` was given.
        output: its output folder.
        against: branch that BLEU differences are taken to, seed by seed.
    """
    reference = bleu_statistics(output / against)
    if not reference:
        raise SystemExit(f"--against {against}: no such branch with results in {output}; name one that has run")
    print(f"| branch | seeds | valid NLL | test NLL | DV | β | joint NLL | sample length | BLEU | against {against} | s/update |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for name in spec["branches"]:
        seeds = bleu_statistics(output / name)
        if not seeds:
            continue
        found = [json.loads((output / name / seed / "measure.json").read_text()) for seed in seeds]
        cells = [spread([numbers[column] for numbers in found]) for column in COLUMNS]
        bleu = spread([corpus_bleu(rows.sum(0)) for rows in seeds.values()], 2)
        seconds = spread([update_seconds(output / name / seed / "train.log") for seed in seeds], 2)
        gain = "" if name == against else difference(seeds, reference)
        print(f"| {name} | {len(seeds)} | {' | '.join(cells)} | {bleu} | {gain} | {seconds} |")


def bleu_statistics(folder: Path) -> Dict[str, np.ndarray]:
    """Seed → (S, 10) BLEU statistics of every test sentence, in the test set's order."""
    return {
        log.parent.name: sentence_statistics(log.read_text())
        for log in sorted(folder.glob("seed*/test.log"))
        if log.read_text().endswith("finished\n")
    }


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


def difference(seeds: Dict[str, np.ndarray], reference: Dict[str, np.ndarray]) -> str:
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


def update_seconds(log: Path) -> float:
    """Median seconds per update over the log's intervals."""
    return statistics.median(1 / float(record["ups"]) for record in read_log(log)["train_inner"] if float(record["ups"]) > 0)
