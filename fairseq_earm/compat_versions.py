"""Which versions of Python, fairseq, torch, numpy and omegaconf work together, and saying so. Imports none of them."""
from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import logging
import re
import sys
from typing import Dict, NamedTuple, Optional, Tuple

logger = logging.getLogger("fairseq_earm")

Version = Tuple[int, int]
FORK = "fairseq-fixed"
STOCK = "fairseq"


class Row(NamedTuple):
    """One row of the support matrix: the fairseq and the ranges (first, last) in which it was tested."""

    fairseq: str
    torch: Tuple[Version, Version]
    numpy: Tuple[Version, Version]
    omegaconf: Tuple[Version, Version]


ROWS = {
    FORK: Row("0.12.3.1", torch=((2, 13), (2, 13)), numpy=((2, 0), (2, 99)), omegaconf=((2, 3), (2, 3))),
    STOCK: Row("0.12.2", torch=((1, 13), (2, 5)), numpy=((1, 20), (1, 23)), omegaconf=((2, 0), (2, 3))),
}


def check_versions() -> None:
    """Say in one line that the installed versions cannot work together (ImportError) or were not tested (a warning)."""
    found = {name: _installed(name) for name in (FORK, STOCK, "torch", "numpy", "omegaconf")}
    if not found[FORK] and not found[STOCK] and importlib.util.find_spec("fairseq"):
        found[STOCK] = "from a source folder"
    problem = unsupported(sys.version_info[:2], found)
    if problem:
        raise ImportError(f"fairseq-earm: {problem}")
    remark = untested(found)
    if remark:
        warn_once(f"fairseq-earm: {remark}")


def unsupported(python: Version, found: Dict[str, Optional[str]]) -> Optional[str]:
    """What cannot work and its remedy in one line, or None. `found` maps distributions to versions, None if missing."""
    remedy = f"{FORK}=={ROWS[FORK].fairseq}" if python >= (3, 11) else f"{STOCK}=={ROWS[STOCK].fairseq}"
    if not (3, 9) <= python <= (3, 12):
        return f"Python {_dotted(python)} is not supported; use Python 3.9 to 3.12."
    if found[FORK] and found[STOCK]:
        return f"{FORK} and {STOCK} overwrite each other; pip uninstall -y {FORK} {STOCK}, then install {remedy}."
    if not found[FORK] and not found[STOCK]:
        return f"fairseq is not installed; `make setup` installs {remedy} with all it needs."
    if found[STOCK] == ROWS[STOCK].fairseq and python >= (3, 11):
        return f"stock fairseq {found[STOCK]} does not run on Python {_dotted(python)}; install {remedy} instead."
    if found[FORK] and python < (3, 11):
        return f"{FORK} needs Python 3.11 or 3.12, this is {_dotted(python)}; install {remedy} instead."
    for name in ("torch", "numpy", "omegaconf"):
        if not found[name]:
            return f"{name} is not installed; `make setup` installs everything."
    if parse(found["torch"]) < (1, 13):
        return f"torch {found['torch']} is too old; install torch 1.13.1 or later."
    if found[STOCK] == ROWS[STOCK].fairseq and parse(found["numpy"]) >= (1, 24):
        return f"stock fairseq {found[STOCK]} does not run with numpy {found['numpy']}; pip install 'numpy<1.24'."
    return None


def untested(found: Dict[str, Optional[str]]) -> Optional[str]:
    """Which of the installed versions lie outside the support matrix, in one line, or None."""
    name = FORK if found[FORK] else STOCK
    row = ROWS[name]
    strange = [] if found[name] == row.fairseq else [f"{name} {found[name]} (tested: {row.fairseq})"]
    for other in ("torch", "numpy", "omegaconf"):
        first, last = getattr(row, other)
        if not first <= parse(found[other]) <= last:
            strange.append(f"{other} {found[other]} (tested with {name}: {_dotted(first)} to {_dotted(last)})")
    return f"not tested with {', '.join(strange)}; `make setup` installs tested versions." if strange else None


def parse(version: str) -> Version:
    """'2.13.0+cpu' → (2, 13)."""
    major, minor = re.match(r"(\d+)\.(\d+)", version).groups()
    return int(major), int(minor)


def _dotted(version: Version) -> str:
    return f"{version[0]}.{version[1]}"


def _installed(name: str) -> Optional[str]:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.lru_cache(maxsize=None)
def warn_once(message: str) -> None:
    """Log a warning, unless the same was logged before."""
    logger.warning(message)
