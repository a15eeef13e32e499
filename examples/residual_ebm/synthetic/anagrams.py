"""A made-up text whose distribution is known exactly: the second half of each line says the words of the first again, in any order.

A line has HALF words drawn freely, then HALF words of which each is, with probability 1 − NOISE, one of those first words
that were not said again yet, and otherwise any word. Left to right that asks for a count of what is still owed; a
network that sees both halves at once need only compare them.
"""
from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from typing import Dict, List, Sequence, Tuple

WORDS = tuple("abcdef")
HALF = 5
NOISE = 0.1

Words = Tuple[str, ...]


def next_word_probabilities(owed: Counter) -> Dict[str, float]:
    """p(next word | words still owed), for the second half."""
    left = sum(owed.values())
    noise = NOISE if left else 1.0
    return {word: (1 - noise) * owed[word] / max(left, 1) + noise / len(WORDS) for word in WORDS}


def sample_line(rng: random.Random) -> Words:
    """A line of 2 · HALF words."""
    first = [rng.choice(WORDS) for _ in range(HALF)]
    owed, second = Counter(first), []
    for _ in range(HALF):
        probabilities = next_word_probabilities(owed)
        word = rng.choices(list(probabilities), list(probabilities.values()))[0]
        owed -= Counter([word])
        second.append(word)
    return (*first, *second)


def sample_lines(count: int, seed: int) -> List[Words]:
    rng = random.Random(seed)
    return [sample_line(rng) for _ in range(count)]


def log_probability(first: Sequence[str], second: Sequence[str]) -> float:
    """log p(second half | first half), in nats."""
    owed, total = Counter(first), 0.0
    for word in second:
        total += math.log(next_word_probabilities(owed)[word])
        owed -= Counter([word])
    return total


def second_halves() -> List[Words]:
    """Every second half there is."""
    return list(itertools.product(WORDS, repeat=HALF))


def says_again(first: Sequence[str], second: Sequence[str]) -> bool:
    """Whether the second half is the first in another order."""
    return Counter(first) == Counter(second)
