import math

import pytest

from fairseq_earm.evaluation.text_analysis import mean_difference, summarize_texts


def test_mean_difference_is_paired():
    """Differences 1, 2, 3: mean 2, standard deviation 1."""
    assert mean_difference([11.0, 22.0, 33.0], [10.0, 20.0, 30.0]) == pytest.approx((2.0, 1 / math.sqrt(3)))
    assert mean_difference([1.0], [3.0]) == (-2.0, None)


def test_summary():
    texts = {"data": [[1, 2, 3, 4, 5]], "base": [[1, 2, 1, 2, 1]]}
    log_probs = {"base": {"data": [-4.0, -6.0], "base": [-3.0, -7.0]}}
    summary = summarize_texts(texts, log_probs)
    assert summary["unique_ngrams"] == {"data": {"2": 1, "3": 1, "4": 1}, "base": {"2": 0.5, "3": 2 / 3, "4": 1}}
    values = summary["log_probabilities"]["base"]
    assert values["data"] == {"mean": -5.0, "values": [-4.0, -6.0]}
    assert values["base"] == {"mean": -5.0, "minus_data": 0.0, "standard_error": 1.0, "values": [-3.0, -7.0]}
