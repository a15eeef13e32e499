"""BLEU from statistics of single sentences, as sacreBLEU computes it."""
from __future__ import annotations

from typing import Sequence

import numpy as np
from sacrebleu.metrics import BLEU

ORDER = 4  # n-grams of BLEU


def bleu_statistics(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]], tokenizer: str = "13a", *, lowercase: bool = False
) -> np.ndarray:
    """BLEU's sufficient statistics of every sentence; their sum over sentences gives `corpus_bleu`.

    Args:
        hypotheses: S texts.
        references: one or several reference translations, each of S texts (sacreBLEU's form).
        tokenizer: sacreBLEU's.
    Returns:
        (S, 2 + 2 · 4) int64: length of the hypothesis and of the reference nearest to it in length, in tokens; matching
        n-grams and all n-grams of the hypothesis, n = 1 to 4.
    Raises:
        ValueError: a reference translation has another number of texts.
    """
    if not references or any(isinstance(texts, str) or len(texts) != len(hypotheses) for texts in references):
        raise ValueError(f"each reference translation is a list of {len(hypotheses)} texts, as many as there are hypotheses")
    # The effective order changes a sentence's score only, which is not used.
    metric = BLEU(tokenize=tokenizer, lowercase=lowercase, effective_order=True)
    scores = (metric.sentence_score(text, list(own)) for text, own in zip(hypotheses, zip(*references)))
    rows = [[score.sys_len, score.ref_len, *score.counts, *score.totals] for score in scores]
    return np.array(rows, dtype=np.int64).reshape(-1, 2 + 2 * ORDER)


def corpus_bleu(statistics: np.ndarray) -> float:
    """sacreBLEU's corpus score, of 100, from the sum of sentences' statistics, (2 + 2 · 4,); of no n-grams, 0."""
    values = [int(value) for value in statistics]
    return BLEU.compute_bleu(
        correct=values[2 : 2 + ORDER], total=values[2 + ORDER :], sys_len=values[0], ref_len=values[1], smooth_method="exp"
    ).score
