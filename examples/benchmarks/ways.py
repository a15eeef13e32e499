"""What the ways to train cost: variance reduction, the other objective, passes without dropout, and the controls."""
from __future__ import annotations

from typing import List, Sequence, Tuple

from tables import Row, Setting, Table
from timing import compare, in_own_process
from update import AS_LONG_AS_THE_SOURCE, CROSS_ENTROPY, EARM, precision, update

WAYS = {
    "cross-entropy": CROSS_ENTROPY,
    "E-ARM": [*EARM, *AS_LONG_AS_THE_SOURCE],
    "E-ARM, no variance reduction": [*EARM, *AS_LONG_AS_THE_SOURCE, "--earm-variance-reduction", "none"],
    "E-ARM, --earm-dropout off": [*EARM, *AS_LONG_AS_THE_SOURCE, "--earm-dropout", "off"],
    "nce": [*EARM, *AS_LONG_AS_THE_SOURCE, "--earm-objective", "nce"],
    "control likelihood": [*EARM, "--earm-control", "likelihood"],
    "control likelihood, --earm-dropout off": [*EARM, "--earm-control", "likelihood", "--earm-dropout", "off"],
    "control noise": [*EARM, *AS_LONG_AS_THE_SOURCE, "--earm-control", "noise"],
    "control flat": [*EARM, "--earm-control", "flat"],
}
QUICK = (("small", 10000, 2000),)
FULL = (("small", 10000, 4000), ("iwslt", 10000, 2000))


def rows(setting: Setting, cases: Sequence[Tuple[str, int, int]] = QUICK) -> List[Row]:
    """Every way, in turns with all others; each case has a process of its own, as training has.

    Args:
        cases: model ("iwslt" or "small"), symbols of its vocabulary and target tokens of the batch.
    """
    return [row for case in cases for row in in_own_process(_of_case, setting, *case)]


def _of_case(setting: Setting, size: str, vocabulary: int, tokens: int) -> List[Row]:
    kind = precision(setting)
    updates = {name: update(size, vocabulary, tokens, flags, precision=kind) for name, flags in WAYS.items()}
    costs = compare(updates, setting.rounds)
    case = {"model": size, "vocabulary": vocabulary, "tokens": tokens}
    return [
        {**case, "update": name, "seconds": cost.seconds, "of cross-entropy's": cost.ratio, "MB": cost.megabytes}
        for name, cost in costs.items()
    ]


TABLE = Table(
    "Ways to train",
    {
        "model": "", "vocabulary": ",", "tokens": ",", "update": "", "seconds": ".3f", "of cross-entropy's": ".2f",
        "MB": ",.0f",
    },
    rows, {"cases": QUICK}, {"cases": FULL},
)
