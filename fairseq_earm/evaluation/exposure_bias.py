"""How often one model is surer of the reference's words than another where both have only what they wrote themselves to go by.

Zhang et al. 2019, "Bridging the Gap between Training and Inference for Neural Machine Translation", count the reference words
whose probability is higher under one model than under another when each model reads its own translation so far; Wang et al.
compare E-ARM with its baseline by that count (Table 8). Two things besides exposure bias move it:

* A model that is simply better wins the count. So it is taken once more with the reference as context, over the same words.
* A softmax that is merely sharper wins words that are expected and loses those that are not, and a translation that has left
  the reference's path meets many of these: one temperature for all logits moves the count in either context, and in opposite
  directions. So words are counted once more by their rank in the dictionary, which sharpness leaves as it is.

The measure is crude in one more way: word t of the reference is looked for at step t, wherever the translation has got to by then.
"""
from __future__ import annotations

from itertools import product
from typing import Dict, List, Sequence

import numpy as np

from fairseq_earm.errors import UsageError
from fairseq_earm.evaluation.translate import Translator, WordScores

CONTEXTS = ("own", "reference")
# What words are compared by, and the sign that makes more of it better.
MEASURES = {"probability": 1, "rank": -1}
RESAMPLES, RESAMPLES_BY_POSITION = 10_000, 1_000
# Resamples drawn at once: so many times as many numbers as there are pairs are held.
CHUNK = 500
# Positions that fewer pairs reach are left out of the figures by position: their intervals would fill the plot.
FEWEST_PAIRS = 20


def measure_pairs(translators: Sequence[Translator], indices: Sequence[int], *, beam: int) -> List[dict]:
    """What two models say of the references' words, in both contexts.

    At step t a model reads the first t − 1 words of its own translation. After the last of them it has no context of its own,
    so a reference has min(T, 1 + length of the shorter translation) words that both models reach. End-of-sentence is no word.

    Args:
        translators: A and B.
        indices: numbers of R pairs, a batch.
        beam: of the search that finds the translations.
    Returns:
        R records: `index`, `words` of the reference, and for each context the words' "probability" (log, nats) and "rank", each
        (2, words reached), under A and under B.
    """
    references = [translators[0].reference(index) for index in indices]
    translations = [translator.translate(indices, beam=beam) for translator in translators]
    shortest = [min(map(len, both)) for both in zip(*translations)]
    reached = [reference[: length + 1] for reference, length in zip(references, shortest)]
    scores = {
        context: [translator.score(indices, read, reached) for translator, read in zip(translators, reads)]
        for context, reads in zip(CONTEXTS, (translations, [references, references]))
    }
    return [
        {
            "index": index,
            "words": len(references[row]),
            **{context: _of_both([model[row] for model in both]) for context, both in scores.items()},
        }
        for row, index in enumerate(indices)
    ]


def _of_both(scores: Sequence[WordScores]) -> Dict[str, List[list]]:
    return {
        "probability": [model.log_prob.tolist() for model in scores],
        "rank": [model.rank.tolist() for model in scores],
    }


def summarize(records: Sequence[dict], *, seed: int = 1) -> dict:
    """Counts, ratios and 95 % intervals of the records of `measure_pairs`.

    A ratio is the share of words that are better under A, ties counted half, so that 0.5 is equality and exchanging the
    models gives one minus it. Intervals are those of the bootstrap over pairs (percentiles): the words of a sentence are not
    independent of each other.

    Returns:
        `pairs`, `words`, `not_reached`; for each measure, "probability" and "rank": for each context `greater` (better under A),
        `less`, `ties`, `ratio`, `interval`, and the ratios' `difference`, own minus reference; `by_position`, see `_by_position`.
    Raises:
        UsageError: no word is reached by both models.
    """
    won = [{key: _won(record, *key) for key in product(MEASURES, CONTEXTS)} for record in records]
    totals = np.array([len(record["own"]["rank"][0]) for record in records])
    words = int(totals.sum())
    if not words:
        raise UsageError("no word of these references is reached by both models: the translations or references are empty")
    return {
        "pairs": len(records),
        "words": words,
        "not_reached": sum(record["words"] for record in records) - words,
        **{measure: _compare(won, measure, totals, seed) for measure in MEASURES},
        "by_position": _by_position(won, seed),
    }


def _won(record: dict, measure: str, context: str) -> np.ndarray:
    """(T,) 1 where a word is better under A, ½ where it is a tie, 0 else."""
    a, b = MEASURES[measure] * np.asarray(record[context][measure], dtype=np.float64)
    return (a > b) + 0.5 * (a == b)


def _compare(won: Sequence[dict], measure: str, totals: np.ndarray, seed: int) -> dict:
    """One measure's figures in both contexts."""
    sums = [np.array([pair[measure, context].sum() for pair in won]) for context in CONTEXTS]
    ratios = [total.sum() / totals.sum() for total in sums]
    resampled = _resampled(np.stack([totals, *sums], 1), seed)
    report: Dict[str, dict] = {}
    for context, ratio, others in zip(CONTEXTS, ratios, resampled):
        every = np.concatenate([pair[measure, context] for pair in won])
        counts = {name: int((every == value).sum()) for name, value in (("greater", 1), ("less", 0), ("ties", 0.5))}
        report[context] = {**counts, "ratio": float(ratio), "interval": _interval(others)}
    report["difference"] = {"ratio": float(ratios[0] - ratios[1]), "interval": _interval(resampled[0] - resampled[1])}
    return report


def _resampled(sums: np.ndarray, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """(C, resamples) ratios of sums over pairs drawn with replacement; (S, 1 + C) per pair: the denominator, numerators."""
    rng = np.random.default_rng(seed)
    even = np.full(len(sums), 1 / len(sums))
    drawn = np.concatenate([rng.multinomial(len(sums), even, size=CHUNK) @ sums for _ in range(resamples // CHUNK)])
    drawn = drawn[drawn[:, 0] > 0]
    return drawn[:, 1:].T / drawn[:, 0]


def _interval(values: np.ndarray) -> List[float]:
    return [float(value) for value in np.percentile(values, [2.5, 97.5])]


def _by_position(won: Sequence[dict], seed: int) -> List[dict]:
    """Each position's figures, up to where fewer than `FEWEST_PAIRS` pairs are left.

    Returns:
        `position` from 1, `pairs` that reach it, and for each measure and context `ratio` and `interval`.
    """
    keys = list(product(MEASURES, CONTEXTS))
    rows = []
    for place in range(max(len(pair[keys[0]]) for pair in won)):
        there = np.array([[1.0, *(pair[key][place] for key in keys)] for pair in won if len(pair[keys[0]]) > place])
        if len(there) < FEWEST_PAIRS:
            break
        row: Dict[str, object] = {"position": place + 1, "pairs": len(there)}
        resampled = _resampled(there, seed, RESAMPLES_BY_POSITION)
        for (measure, context), values, others in zip(keys, there.T[1:], resampled):
            row.setdefault(measure, {})[context] = {"ratio": float(values.mean()), "interval": _interval(others)}
        rows.append(row)
    return rows
