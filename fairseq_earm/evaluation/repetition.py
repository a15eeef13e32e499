"""How much a set of texts repeats itself (Deng et al. 2020, Section 4.3)."""
from __future__ import annotations

from typing import Optional, Sequence


def unique_ngram_share(texts: Sequence[Sequence[int]], n: int) -> Optional[float]:
    """Distinct n-grams as a share of all n-grams of a set of texts; None where there is none.

    n-grams lie within one text; one that occurs in two texts is counted twice and is distinct once. The share falls as a
    set grows: compare sets of the same number of tokens.
    """
    grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None
