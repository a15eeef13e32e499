"""Read the n-best lists that fairseq-generate printed under `--task earm_translation --energy-rerank --nbest N`."""
from __future__ import annotations

import json
import math
import re
from typing import Dict, List, NamedTuple, Optional, Sequence

import numpy as np

from fairseq_earm.errors import UsageError
from fairseq_earm.evaluation.generated import tagged_line, text_lines

RECIPE = "pass what fairseq-generate --task earm_translation --energy-rerank --beam N --nbest N printed, and its log"
SETTINGS = re.compile(r"energy reranking: (\{.*\})")
# P-lines are rounded to 4 decimals; divided by a smaller weight than this, the rounding would drown log mu.
SMALLEST_WEIGHT = 0.01
LARGEST_SETTING = 1e6  # of a weight or a length penalty; with larger ones nothing is left of the numbers
MOST_ROOM = 100  # times the candidates that there are, for lists of unequal lengths
BITS_TO_NATS = math.log(2)


class NBest(NamedTuple):
    """S sentences with up to N candidates each, in the file's order; arrays are (S, N), in nats.

    Attributes:
        references: S reference texts.
        texts: for each sentence its candidate texts, detokenised as the command was told to.
        log_q: log-probability of each candidate, −inf where a sentence has fewer than N.
        log_mu: log μ of each candidate, −inf where it is missing or was not finite.
        lengths: tokens of each candidate, end-of-sentence included.
    """

    references: List[str]
    texts: List[List[str]]
    log_q: np.ndarray
    log_mu: np.ndarray
    lengths: np.ndarray


class _Printed(NamedTuple):
    """What the file holds, by sentence number: score and log-probabilities are base 2."""

    settings: dict
    references: Dict[int, str]
    texts: Dict[int, List[str]]
    scores: Dict[int, List[float]]
    token_log_q: Dict[int, List[List[float]]]


def read_nbest(paths: Sequence[str], *, weight: Optional[float] = None, lenpen: Optional[float] = None) -> NBest:
    """Read candidates and recover log μ = (score · length^lenpen − log q) / weight from their D- and P-lines.

    Args:
        paths: what the command wrote, output and log in one file or in several. The log's line "energy reranking: ..."
            tells the weight and the length penalty.
        weight, lenpen: the ones it was generated with, where the log is lost.
    Raises:
        UsageError: a file that cannot be read or lacks lines, lists of one candidate, scores without energy.
    """
    printed = _Printed({}, {}, {}, {}, {})
    for path in paths:
        _parse(path, printed)
    name = " ".join(paths)
    _check_complete(name, printed)
    weight = _setting(name, "energy_weight", weight, printed.settings)
    lenpen = _setting(name, "lenpen", lenpen, printed.settings)
    if weight < SMALLEST_WEIGHT:
        raise UsageError(
            f"log mu cannot be recovered from scores generated with --energy-weight {weight:g}: generate again with 1.0"
        )
    nbest = _arrays(printed, weight, lenpen)
    energy = weight * nbest.log_mu[np.isfinite(nbest.log_mu)]
    if np.abs(energy).max(initial=0.0) < 1e-4 * nbest.lengths.max():
        raise UsageError(f"{name}: the scores hold no energy, only log q: generate again with --energy-rerank")
    return nbest


def _parse(path: str, printed: _Printed) -> None:
    for line in text_lines(path):
        try:
            _take(line, printed)
        except (ValueError, RecursionError):
            raise UsageError(f"{path}: a line without its numbers, {line[:60]!r}: {RECIPE}") from None


def _take(line: str, printed: _Printed) -> None:
    """Note what one line says, if it is of use."""
    settings = SETTINGS.search(line)
    if settings:
        printed.settings.update(_numbers(json.loads(settings.group(1))))
    kind, sentence, rest = tagged_line(line) or ("", 0, "")
    if kind == "T":
        if sentence in printed.references:
            raise UsageError(f"sentence {sentence} has two T-lines: pass the output of one run")
        printed.references[sentence] = rest
    elif kind == "D":
        score, _, text = rest.partition("\t")
        printed.scores.setdefault(sentence, []).append(float(score))
        printed.texts.setdefault(sentence, []).append(text)
    elif kind == "P":
        printed.token_log_q.setdefault(sentence, []).append([float(value) for value in rest.split()])


def _numbers(settings: dict) -> Dict[str, float]:
    """The settings that are needed; other versions may log more.

    Raises:
        ValueError: one is no finite number.
    """
    found = {name: settings[name] for name in ("energy_weight", "lenpen") if name in settings}
    for value in found.values():
        if type(value) not in (int, float) or not abs(value) < LARGEST_SETTING:
            raise ValueError("a setting that is no number")
    return found


def _check_complete(path: str, printed: _Printed) -> None:
    if not printed.texts:
        raise UsageError(f"{path} holds no hypotheses (H-, D- and P-lines): {RECIPE}")
    if not printed.references:
        raise UsageError(f"{path} holds no references (T-lines): generate from a data set with a target side")
    if printed.references.keys() != printed.texts.keys():
        counts = f"{len(printed.references)} sentences with T-lines, {len(printed.texts)} with hypotheses"
        raise UsageError(f"{path} is incomplete, {counts}: {RECIPE}")
    sizes = {sentence: len(texts) for sentence, texts in printed.texts.items()}
    if sizes != {sentence: len(rows) for sentence, rows in printed.token_log_q.items()}:
        raise UsageError(f"{path}: some hypotheses lack their P-lines: {RECIPE}")
    if len(sizes) * max(sizes.values()) > MOST_ROOM * sum(sizes.values()):
        raise UsageError(f"{path}: one sentence has {max(sizes.values())} hypotheses, the {len(sizes)} sentences {sum(sizes.values())}: {RECIPE}")
    if max(sizes.values()) == 1:
        raise UsageError(f"{path} has one hypothesis per sentence, nothing to choose from: {RECIPE}, N of 2 or more")


def _setting(path: str, name: str, given: Optional[float], logged: dict) -> float:
    """What the log says, or else the flag; the two may not contradict each other."""
    flag = f"--generated-{name.replace('_', '-')}"
    if name not in logged and given is None:
        raise UsageError(
            f"{path}: no log line 'energy reranking: ...' says how it was generated: pass the log (fairseq's standard error) "
            f"as a further file, or {flag}"
        )
    if given is not None and logged.get(name, given) != given:
        raise UsageError(f"{flag} {given:g}, but the log says {logged[name]:g}: leave the flag out")
    return logged.get(name, given)


def _arrays(printed: _Printed, weight: float, lenpen: float) -> NBest:
    sentences = list(printed.texts)
    shape = len(sentences), max(map(len, printed.texts.values()))
    log_q, log_mu, lengths = np.full(shape, -np.inf), np.full(shape, -np.inf), np.ones(shape)
    for row, sentence in enumerate(sentences):
        size = len(printed.texts[sentence])
        tokens = printed.token_log_q[sentence]
        lengths[row, :size] = [max(1, len(values)) for values in tokens]
        log_q[row, :size] = [sum(values) * BITS_TO_NATS for values in tokens]
        # −inf less −inf: a candidate that the model holds impossible
        with np.errstate(invalid="ignore", over="ignore"):
            totals = np.array(printed.scores[sentence]) * BITS_TO_NATS * lengths[row, :size] ** lenpen
            log_mu[row, :size] = np.nan_to_num((totals - log_q[row, :size]) / weight, nan=-np.inf, neginf=-np.inf)
    return NBest(
        [printed.references[sentence] for sentence in sentences], list(printed.texts.values()), log_q, log_mu, lengths
    )
