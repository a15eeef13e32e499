"""How often one model is surer of the reference's words than another where both have only what they wrote themselves to go by.

Zhang et al. 2019, "Bridging the Gap between Training and Inference for Neural Machine Translation", count the reference words
whose probability is higher under one model than under another when each model reads its own translation so far; Wang et al.
compare E-ARM with its baseline by that count (Table 8). A model that is simply better wins the count as well, so it is taken
once more with the reference as context, over the same words: exposure bias is what is left between the two.

The measure is crude in one way: word t of the reference is looked for at step t, wherever the translation has got to by then.
"""
from __future__ import annotations

from typing import Dict, List, Sequence

import numpy as np

from fairseq_earm.errors import UsageError
from fairseq_earm.evaluation.translate import Translator

CONTEXTS = ("own", "reference")
RESAMPLES, RESAMPLES_BY_POSITION = 10_000, 1_000
# Resamples drawn at once: so many times as many numbers as there are pairs are held.
CHUNK = 500
# Positions that fewer pairs reach are left out of the figures by position: their intervals would fill the plot.
FEWEST_PAIRS = 20


def measure_pairs(translators: Sequence[Translator], indices: Sequence[int], *, beam: int) -> List[dict]:
    """Log-probabilities of the references' words under two models, in both contexts.

    At step t a model reads the first t − 1 words of its own translation. After the last of them it has no context of its own,
    so a reference has min(T, 1 + length of the shorter translation) words that both models reach. End-of-sentence is no word.

    Args:
        translators: A and B.
        indices: numbers of R pairs, a batch.
        beam: of the search that finds the translations.
    Returns:
        R records: `index`, `words` of the reference, and for each context the log-probabilities (2, words reached) under A and B.
    """
    references = [translators[0].reference(index) for index in indices]
    translations = [translator.translate(indices, beam=beam) for translator in translators]
    shortest = [min(map(len, both)) for both in zip(*translations)]
    reached = [reference[: length + 1] for reference, length in zip(references, shortest)]
    twice = [*indices, *indices]
    log_probs = []
    for translator, own in zip(translators, translations):
        found = translator.energies(twice, [*own, *references], [*reached, *reached])
        log_probs.append([(-energies.nll).tolist() for energies in found])
    return [
        {
            "index": index,
            "words": len(references[row]),
            "own": [model[row] for model in log_probs],
            "reference": [model[row + len(indices)] for model in log_probs],
        }
        for row, index in enumerate(indices)
    ]


def summarize(records: Sequence[dict], *, seed: int = 1) -> dict:
    """Counts, ratios and 95 % intervals of the records of `measure_pairs`.

    A ratio is the share of words that are likelier under A, ties counted half, so that 0.5 is equality and exchanging the
    models gives one minus it. Intervals are those of the bootstrap over pairs (percentiles): the words of a sentence are not
    independent of each other.

    Returns:
        `words`, `not_reached`, `pairs`; for each context `greater`, `less`, `ties`, `ratio`, `interval`; their `difference`, own
        minus reference; `by_position`: "position" from 1, "pairs" that reach it, and each context's ratio and interval.
    Raises:
        UsageError: no word is reached by both models.
    """
    words = sum(len(record["own"][0]) for record in records)
    if not words:
        raise UsageError("no word of these references is reached by both models: the translations or references are empty")
    totals = np.array([len(record["own"][0]) for record in records])
    shares = {context: np.array([_won(record[context]).sum() for record in records]) for context in CONTEXTS}
    ratios = _resampled(np.stack([totals, *shares.values()], 1), seed)
    report: Dict[str, object] = {
        "pairs": len(records),
        "words": words,
        "not_reached": sum(record["words"] for record in records) - words,
    }
    for number, context in enumerate(CONTEXTS):
        report[f"{context}_context"] = {
            **_counts([record[context] for record in records]),
            "ratio": float(shares[context].sum() / words),
            "interval": _interval(ratios[number]),
        }
    report["difference"] = {
        "ratio": float((shares["own"] - shares["reference"]).sum() / words),
        "interval": _interval(ratios[0] - ratios[1]),
    }
    report["by_position"] = _by_position(records, seed)
    return report


def _won(log_probs: Sequence[Sequence[float]]) -> np.ndarray:
    """(T,) 1 where a word is likelier under A, ½ where it is a tie, 0 else."""
    a, b = np.asarray(log_probs, dtype=np.float64)
    return (a > b) + 0.5 * (a == b)


def _counts(log_probs: Sequence[Sequence[Sequence[float]]]) -> dict:
    won = np.concatenate([_won(pair) for pair in log_probs])
    return {"greater": int((won == 1).sum()), "less": int((won == 0).sum()), "ties": int((won == 0.5).sum())}


def _resampled(sums: np.ndarray, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """(C, resamples) ratios of sums over pairs drawn with replacement; (S, 1 + C) per pair: the denominator, numerators."""
    rng = np.random.default_rng(seed)
    even = np.full(len(sums), 1 / len(sums))
    drawn = np.concatenate([rng.multinomial(len(sums), even, size=CHUNK) @ sums for _ in range(resamples // CHUNK)])
    return drawn[drawn[:, 0] > 0].T[1:] / drawn[drawn[:, 0] > 0, 0]


def _interval(values: np.ndarray) -> List[float]:
    return [float(value) for value in np.percentile(values, [2.5, 97.5])]


def _by_position(records: Sequence[dict], seed: int) -> List[dict]:
    """Each position's figures, up to where fewer than `FEWEST_PAIRS` pairs are left."""
    won = [{context: _won(record[context]) for context in CONTEXTS} for record in records]
    rows = []
    for place in range(max(len(pair["own"]) for pair in won)):
        there = np.array([[1.0, *(pair[context][place] for context in CONTEXTS)] for pair in won if len(pair["own"]) > place])
        if len(there) < FEWEST_PAIRS:
            break
        ratios = _resampled(there, seed, RESAMPLES_BY_POSITION)
        row = {"position": place + 1, "pairs": len(there)}
        for number, context in enumerate(CONTEXTS):
            row[context] = {"ratio": float(there[:, number + 1].mean()), "interval": _interval(ratios[number])}
        rows.append(row)
    return rows
