"""BLEU, ROUGE and METEOR, computed by their libraries, from statistics of single sentences that a bootstrap can draw from."""
from __future__ import annotations

from importlib.metadata import version
from types import SimpleNamespace
from typing import Dict, Sequence

import numpy as np
from sacrebleu.metrics import BLEU

from fairseq_earm.errors import UsageError

ORDER = 4  # n-grams of BLEU
ROUGE_TYPES = {"ROUGE-1": "rouge1", "ROUGE-2": "rouge2", "ROUGE-L": "rougeL"}


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


def mean_score(statistics: np.ndarray) -> float:
    """Mean over sentences, of 100, from the sum of rows (score of a sentence, 1)."""
    return 100 * float(statistics[0] / statistics[1])


class Bleu:
    """sacreBLEU's BLEU.

    Args:
        references: one or several reference translations, each of S texts.
        tokenizer: sacreBLEU's.
    """

    score = staticmethod(corpus_bleu)

    def __init__(self, references: Sequence[Sequence[str]], tokenizer: str, *, lowercase: bool = False):
        self._references, self._tokenizer, self._lowercase = references, tokenizer, lowercase

    def statistics(self, hypotheses: Sequence[str]) -> Dict[str, np.ndarray]:
        """Name of each score → (S, K) statistics of S texts, whose sum over sentences `score` takes."""
        return {"BLEU": bleu_statistics(hypotheses, self._references, self._tokenizer, lowercase=self._lowercase)}

    def signature(self) -> str:
        """sacreBLEU's own."""
        metric = BLEU(tokenize=self._tokenizer, lowercase=self._lowercase)
        metric.corpus_score([""], [[""] for _ in self._references])  # it has no signature before it has seen references
        return f"BLEU|{metric.get_signature()}"


class Rouge:
    """F-measures of ROUGE-1, -2 and -L by rouge-score, without stemming; means over sentences; of several references the best.

    Its tokens are runs of a-z and 0-9 in lower case: other letters part them.

    Raises:
        UsageError: rouge-score is not installed.
    """

    score = staticmethod(mean_score)

    def __init__(self, references: Sequence[Sequence[str]]):
        try:
            from rouge_score.rouge_scorer import RougeScorer
            from rouge_score.tokenizers import DefaultTokenizer
        except ImportError:
            raise _missing("rouge", "rouge-score") from None
        self._references = references
        self._scorer = RougeScorer(list(ROUGE_TYPES.values()), tokenizer=DefaultTokenizer(use_stemmer=False))

    def statistics(self, hypotheses: Sequence[str]) -> Dict[str, np.ndarray]:
        """As of `Bleu`."""
        found = [self._scorer.score_multi(list(own), text) for text, own in zip(hypotheses, zip(*self._references))]
        return {name: _mean_statistics([scores[kind].fmeasure for scores in found]) for name, kind in ROUGE_TYPES.items()}

    def signature(self) -> str:
        """In the manner of sacreBLEU's."""
        return f"ROUGE|nrefs:{len(self._references)}|case:lc|tok:a-z0-9|stemmer:no|score:F1|rouge-score:{version('rouge-score')}"


class Meteor:
    """METEOR by nltk, a mean over sentences; of several references the best one counts.

    Words match as they are, by their Porter stems, and by WordNet's synonyms where nltk has that corpus.

    Args:
        references: one or several reference translations, each of S texts.
        tokenizer: sacreBLEU's, which also cuts METEOR's words.
    Raises:
        UsageError: nltk is not installed.
    """

    score = staticmethod(mean_score)

    def __init__(self, references: Sequence[Sequence[str]], tokenizer: str):
        try:
            from nltk.corpus import wordnet
            from nltk.translate.meteor_score import meteor_score
        except ImportError:
            raise _missing("meteor", "nltk") from None
        self._tokenizer = tokenizer
        self._references = [self._words(texts) for texts in references]
        self._meteor_score = meteor_score
        try:
            wordnet.synsets("word")
            self._wordnet, self._synonyms = wordnet, "WordNet"
        except LookupError:
            self._wordnet, self._synonyms = SimpleNamespace(synsets=lambda word: []), "none"

    def _words(self, texts: Sequence[str]) -> list:
        cut = BLEU(tokenize=self._tokenizer).tokenizer
        return [cut(text.rstrip()).split() for text in texts]

    def statistics(self, hypotheses: Sequence[str]) -> Dict[str, np.ndarray]:
        """As of `Bleu`."""
        pairs = zip(self._words(hypotheses), zip(*self._references))
        scores = [self._meteor_score(list(own), words, wordnet=self._wordnet) for words, own in pairs]
        return {"METEOR": _mean_statistics(scores)}

    def signature(self) -> str:
        """In the manner of sacreBLEU's."""
        return (
            f"METEOR|nrefs:{len(self._references)}|case:lc|tok:{self._tokenizer}|stemmer:Porter|synonyms:{self._synonyms}|"
            f"alpha:0.9|beta:3|gamma:0.5|nltk:{version('nltk')}"
        )


def _mean_statistics(scores: Sequence[float]) -> np.ndarray:
    """(S, 2) rows for `mean_score`."""
    return np.stack([np.array(scores, dtype=np.float64), np.ones(len(scores))], 1)


def _missing(metric: str, library: str) -> UsageError:
    return UsageError(
        f"--metrics {metric}: {library} is not installed: pip install {library}, or name the other metrics with --metrics"
    )
