import pytest

from fairseq_earm.evaluation.repetition import unique_ngram_share


@pytest.mark.parametrize("n, share", [(1, 3 / 7), (2, 3 / 5), (3, 3 / 3)])
def test_by_hand(n, share):
    """1 2 1 2 and 1 2 3: 1-grams 1 2 3; 2-grams 12 21 12 12 23; 3-grams 121 212 123, none across the two texts."""
    assert unique_ngram_share([[1, 2, 1, 2], [1, 2, 3]], n) == pytest.approx(share)


def test_texts_too_short_for_any():
    assert unique_ngram_share([[1], []], 2) is None
