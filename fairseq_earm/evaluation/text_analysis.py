"""Data beside samples of a base and a joint model: what each model thinks of them, and how they repeat themselves
(Deng et al. 2020, Section 4.3).
"""
from __future__ import annotations

import math
from typing import Dict, List, Mapping, NamedTuple, Optional, Sequence

import torch

from fairseq_earm.evaluation.repetition import unique_ngram_share

ORDERS = (2, 3, 4)


class Difference(NamedTuple):
    """Mean of samples minus mean of data, and its standard error over pairs; None for a single pair."""

    difference: float
    standard_error: Optional[float]


def mean_difference(samples: Sequence[float], data: Sequence[float]) -> Difference:
    """Paired: value i of both belongs to prefix i."""
    differences = torch.tensor(samples, dtype=torch.float64) - torch.tensor(data, dtype=torch.float64)
    count = differences.numel()
    error = (differences.std() / math.sqrt(count)).item() if count > 1 else None
    return Difference(differences.mean().item(), error)


def summarize_texts(texts: Mapping[str, Sequence[Sequence[int]]], log_probs: Mapping[str, Mapping[str, List[float]]]) -> dict:
    """Plain numbers for JSON and figures.

    Args:
        texts: "data" and further sources of text → one token list for each prefix.
        log_probs: model → source of text → log-probability of each of its texts, in nats.
    Returns:
        unique_ngrams: source → {order: share of n-grams that are distinct}; log_probabilities: model → source → {mean, and
        for other sources than the data minus_data with its standard_error; values}.
    """
    return {
        "unique_ngrams": {
            source: {str(n): unique_ngram_share(rows, n) for n in ORDERS} for source, rows in texts.items()
        },
        "log_probabilities": {model: _compare(values) for model, values in log_probs.items()},
    }


def _compare(values: Mapping[str, List[float]]) -> Dict[str, dict]:
    found: Dict[str, dict] = {}
    for source, own in values.items():
        found[source] = {"mean": math.fsum(own) / len(own)}
        if source != "data":
            difference = mean_difference(own, values["data"])
            found[source].update(minus_data=difference.difference, standard_error=difference.standard_error)
        found[source]["values"] = list(own)
    return found

