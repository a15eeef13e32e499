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
from typing import Dict, List, Optional, Sequence

import numpy as np

from fairseq_earm.errors import UsageError
from fairseq_earm.evaluation.significance import draw_multinomial
from fairseq_earm.evaluation.translate import Translator, WordScores

CONTEXTS = ("own", "reference")
# What words are compared by, and the sign that makes more of it better.
MEASURES = {"probability": 1, "rank": -1}
KEYS = list(product(MEASURES, CONTEXTS))
RESAMPLES, RESAMPLES_BY_POSITION = 10_000, 1_000
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

    A ratio is the share, among the words that are not the same under both models, of those that are better under A: 0.5 is
    equality, and exchanging the models gives one minus it. Most words are ties by rank, more of them where both models read the
    same context: counted half, they would draw that context's ratio towards 0.5. Intervals are those of the bootstrap over pairs
    (percentiles): the words of a sentence are not independent of each other.

    Returns:
        `pairs`, `words`, `not_reached`; for each measure, "probability" and "rank": for each context `greater` (better under A),
        `less`, `ties`, `ratio`, `interval`, and the ratios' `difference`, own minus reference; `by_position`, see `_by_position`.
        Ratios and intervals are None where there are ties alone.
    Raises:
        UsageError: no word is reached by both models.
    """
    signs = [{key: _signs(record, *key) for key in KEYS} for record in records]
    words = sum(len(pair[KEYS[0]]) for pair in signs)
    if not words:
        raise UsageError("no word of these references is reached by both models: the translations or references are empty")
    return {
        "pairs": len(records),
        "words": words,
        "not_reached": sum(record["words"] for record in records) - words,
        **_by_measure(signs, seed, RESAMPLES),
        "by_position": _by_position(signs, seed),
    }


def _signs(record: dict, measure: str, context: str) -> np.ndarray:
    """(T,) 1 where a word is better under A, −1 where it is better under B, 0 where it is a tie."""
    a, b = MEASURES[measure] * np.asarray(record[context][measure], dtype=np.float64)
    return np.sign(a - b)


def _by_measure(signs: Sequence[dict], seed: int, resamples: int) -> dict:
    """Measure → the figures of both contexts, and of their difference."""
    counts = {key: [np.array([(pair[key] == sign).sum() for pair in signs]) for sign in (1, -1, 0)] for key in KEYS}
    resampled = dict(zip(KEYS, _resampled([counts[key] for key in KEYS], seed, resamples)))
    report: Dict[str, dict] = {}
    for measure in MEASURES:
        rows = {}
        for context in CONTEXTS:
            greater, less, ties = (int(count.sum()) for count in counts[measure, context])
            ratio = greater / (greater + less) if greater + less else None
            rows[context] = {"greater": greater, "less": less, "ties": ties, "ratio": ratio}
            rows[context]["interval"] = _interval(resampled[measure, context])
        own, reference = (rows[context]["ratio"] for context in CONTEXTS)
        both = [resampled[measure, context] for context in CONTEXTS]
        report[measure] = {
            **rows,
            "difference": {"ratio": None if None in (own, reference) else own - reference, "interval": _interval(both[0] - both[1])},
        }
    return report


def _resampled(counts: Sequence[Sequence[np.ndarray]], seed: int, resamples: int) -> np.ndarray:
    """(K, resamples) ratios over pairs drawn with replacement, NaN where all is tied, from K times (greater, less, …) per pair."""
    columns = np.stack([column for greater, less, *_ in counts for column in (greater, greater + less)], 1)
    drawn = [counts @ columns for counts in draw_multinomial(len(columns), resamples, seed)]
    greater, decided = np.concatenate(drawn).reshape(-1, len(counts), 2).T
    return np.divide(greater, decided, out=np.full(greater.shape, np.nan), where=decided > 0)


def _interval(values: np.ndarray) -> Optional[List[float]]:
    known = values[~np.isnan(values)]
    return [float(value) for value in np.percentile(known, [2.5, 97.5])] if len(known) else None


def _by_position(signs: Sequence[dict], seed: int) -> List[dict]:
    """Each position's figures, up to where fewer than `FEWEST_PAIRS` pairs are left.

    Returns:
        `position` from 1, `pairs` that reach it, and the figures of each measure as for all positions together.
    """
    rows: List[dict] = []
    while True:
        place = len(rows)
        there = [{key: values[place : place + 1] for key, values in pair.items()} for pair in signs if len(pair[KEYS[0]]) > place]
        if len(there) < FEWEST_PAIRS:
            return rows
        rows.append({"position": place + 1, "pairs": len(there), **_by_measure(there, seed, RESAMPLES_BY_POSITION)})
