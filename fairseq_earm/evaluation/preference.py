"""Which of two systems people prefer, and whether that could be chance (Deng et al. 2020, Table 2)."""
from __future__ import annotations

from math import comb
from typing import List, NamedTuple, Sequence

from fairseq_earm.errors import UsageError


LEFT = ["A", "B", "real", "shuffled"]


class Preference(NamedTuple):
    """Votes for the systems "A" and "B".

    Attributes:
        wins_a, wins_b: votes of the raters that passed.
        p_value: one-sided, of A being preferred: the probability of `wins_a` or more out of all votes if each were a toss
            of a coin.
        raters: how many passed the attention checks.
        excluded: names of those that did not.
        unanswered: pairs left open by raters that passed; nobody's votes.
    """

    wins_a: int
    wins_b: int
    p_value: float
    raters: int
    excluded: List[str]
    unanswered: int


def binomial_p_value(wins: int, votes: int) -> float:
    """P(X ≥ wins) for X ~ Binomial(votes, 1/2), exactly."""
    return sum(comb(votes, k) for k in range(wins, votes + 1)) / 2**votes


def is_key(key: dict) -> bool:
    """Whether a dictionary is the key of a page."""
    items = key.get("items")
    return isinstance(key.get("page"), str) and isinstance(items, list) and all(
        isinstance(item, dict) and type(item.get("item")) is int and item.get("left") in LEFT for item in items
    )


def preference(answers: Sequence[dict], key: dict, *, allowed_failures: int = 0) -> Preference:
    """Count the votes of the raters that passed the attention checks.

    Votes are counted as independent; those of several raters on one pair are so only if pairs differ little.

    Args:
        answers: what raters downloaded from the page, one each: {"page", "rater", "answers": {item: "left" or "right"}}.
        key: the page's key.
        allowed_failures: attention checks that a rater may get wrong, or leave open, and still pass.
    Raises:
        UsageError: answers to another page or to items that are not on it.
    """
    checks = {str(item["item"]): item["left"] for item in key["items"] if item["left"] in ("real", "shuffled")}
    pairs = {str(item["item"]): item["left"] for item in key["items"] if str(item["item"]) not in checks}
    votes, excluded, unanswered = {"A": 0, "B": 0}, [], 0
    for number, rater in enumerate(answers, start=1):
        name = str(rater.get("rater") or f"rater {number}")
        given = _valid_answers(rater, name, key["page"], {**checks, **pairs})
        failed = sum(given.get(item) != ("left" if left == "real" else "right") for item, left in checks.items())
        if failed > allowed_failures:
            excluded.append(name)
            continue
        for item, left in pairs.items():
            if item not in given:
                unanswered += 1
            else:
                votes[left if given[item] == "left" else _other(left)] += 1
    total = votes["A"] + votes["B"]
    p_value = binomial_p_value(votes["A"], total)
    return Preference(votes["A"], votes["B"], p_value, len(answers) - len(excluded), excluded, unanswered)


def _valid_answers(rater: dict, name: str, page: str, items: dict) -> dict:
    if rater.get("page") != page:
        raise UsageError(
            f"the answers of {name} are to page {rater.get('page')}, the key is page {page}'s: give the key written with it"
        )
    given = rater.get("answers")
    if not isinstance(given, dict) or not set(given) <= set(items) or any(side not in ["left", "right"] for side in given.values()):
        raise UsageError(f"the answers of {name} are not what the page writes: download them again")
    return given


def _other(system: str) -> str:
    return "B" if system == "A" else "A"
