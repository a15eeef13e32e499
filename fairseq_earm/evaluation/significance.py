"""Is one system better than another? The paired bootstrap over sentences (Koehn 2004)."""
from __future__ import annotations

from typing import Callable, Iterator, NamedTuple, Sequence

import numpy as np

SACREBLEU_SEED = 12345  # what sacreBLEU draws with unless told otherwise
DRAWN_AT_ONCE = 4_000_000  # sentence numbers, so that memory stays small for long texts


class Difference(NamedTuple):
    """How much higher a system scores than another.

    Attributes:
        difference: of the scores' means over seeds, on all sentences.
        low, high: its 95 % interval, percentiles of the resamples.
        p_value: two-sided; as a rule below 0.05 where the interval leaves out zero.
        sacrebleu_p_value: what sacreBLEU's PairedTest calls p. It leaves the sign out before it shifts the resamples to the null
            hypothesis, so it is about half the two-sided p: of systems that do not differ, about 11 % get one below 0.05.
    """

    difference: float
    low: float
    high: float
    p_value: float
    sacrebleu_p_value: float


def paired_bootstrap(
    system: Sequence[np.ndarray],
    baseline: Sequence[np.ndarray],
    score: Callable[[np.ndarray], float],
    *,
    resamples: int = 1000,
    seed: int = SACREBLEU_SEED,
) -> Difference:
    """Draw sentences anew, the same for both systems and for all their seeds, and see how the scores' difference varies.

    The score of a system is its mean over seeds. So it does not matter which seed stands beside which, and the interval and
    p tell about other sentences, not about other seeds. With d the difference and d* that of a resample, p is the share of
    resamples with |d* − mean d*| ≥ |d|, and sacreBLEU's p that with |d*| − mean |d*| > |d|, one added to count and number of
    each. With one seed each and BLEU, the latter is what sacreBLEU finds, to the digit.

    Args:
        system, baseline: for each seed (S, K) statistics of every sentence, whose sum over sentences `score` takes.
        score: (K,) sum → score.
    Raises:
        ValueError: no seed, or statistics of different numbers of sentences.
    """
    sentences = {len(rows) for rows in (*system, *baseline)}
    if not system or not baseline or len(sentences) != 1:
        raise ValueError("each of the two systems needs a seed, and all the same number of sentences")

    def difference(counts: np.ndarray) -> np.ndarray:
        means = [np.mean([[score(total) for total in counts @ rows] for rows in seeds], 0) for seeds in (system, baseline)]
        return means[0] - means[1]

    size = sentences.pop()
    observed = float(difference(np.ones((1, size)))[0])
    drawn = np.concatenate([difference(counts) for counts in draw_counts(size, resamples, seed)])
    low, high = np.percentile(drawn, [2.5, 97.5])
    p_value = _share(np.abs(drawn - drawn.mean()) >= abs(observed))
    return Difference(observed, float(low), float(high), p_value, _share(np.abs(drawn) - np.abs(drawn).mean() > abs(observed)))


def draw_counts(sentences: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Resamples as (some, S) float64 arrays, how often each sentence was drawn; sacreBLEU's draws under the same seed."""
    generator = np.random.default_rng(seed)
    step = max(1, DRAWN_AT_ONCE // sentences)
    for start in range(0, resamples, step):
        drawn = generator.choice(sentences, size=(min(step, resamples - start), sentences), replace=True)
        yield np.array([np.bincount(row, minlength=sentences) for row in drawn], dtype=np.float64)


def draw_multinomial(units: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Resamples as (some, U) float64 arrays, how often each unit was drawn; the same ones whatever `DRAWN_AT_ONCE`."""
    generator, even = np.random.default_rng(seed), np.full(units, 1 / units)
    step = max(1, DRAWN_AT_ONCE // units)
    for start in range(0, resamples, step):
        yield generator.multinomial(units, even, size=min(step, resamples - start)).astype(np.float64)


def _share(exceed: np.ndarray) -> float:
    return float((exceed.sum() + 1) / (len(exceed) + 1))
