"""Read translations: what fairseq-generate or fairseq-interactive printed, or plain text."""
from __future__ import annotations

import re
from typing import Dict, Iterable, Iterator, List, NamedTuple, Optional, Tuple

from fairseq_earm.errors import UsageError

TAGGED = re.compile(r"([STHDP])-(\d{1,18})\t(.*)", re.ASCII)


class Generated(NamedTuple):
    """What was printed about S sentences, in the order of their numbers.

    Attributes:
        sources, references: S- and T-lines; None where none was printed. T-lines are processed as D-lines are.
        hypotheses: the first H-line of each sentence, as the model wrote it (after --remove-bpe).
        detokenised: the first D-line of each, after --bpe and --tokenizer: the text to hold against T-lines.
    """

    sources: Optional[List[str]]
    references: Optional[List[str]]
    hypotheses: List[str]
    detokenised: List[str]


def text_lines(path: str) -> Iterator[str]:
    """The lines of a UTF-8 text without their line ends; only line feeds end a line, with or without a carriage return.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        with open(path, encoding="utf-8", newline="\n") as lines:
            for line in lines:
                yield line.rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None


def tagged_line(line: str) -> Optional[Tuple[str, int, str]]:
    """Letter, sentence number and rest of a line of fairseq-generate (S, T, H, D, P); None for any other line."""
    match = TAGGED.fullmatch(line)
    return match and (match.group(1), int(match.group(2)), match.group(3))


def is_generated(lines: Iterable[str]) -> bool:
    """Whether lines of fairseq-generate are among them, rather than plain text alone."""
    return any(tagged_line(line) for line in lines)


def read_generated(path: str, printed: Optional[Iterable[str]] = None) -> Generated:
    """Read the best hypothesis of every sentence from what fairseq-generate printed, with or without its log.

    Args:
        printed: the file's lines, if they have been read already.
    Raises:
        UsageError: it cannot be read; lines of a sentence are missing or it was printed twice; sentences are missing.
    """
    lines: Dict[str, Dict[int, str]] = {tag: {} for tag in "STHD"}
    for line in text_lines(path) if printed is None else printed:
        tag, sentence, rest = tagged_line(line) or ("", 0, "")
        if tag in ("S", "T") and sentence in lines[tag]:
            raise UsageError(f"{path}: sentence {sentence} has two {tag}-lines: give the output of one run")
        if tag in lines:
            lines[tag].setdefault(sentence, rest)
    _check_complete(path, lines)
    texts = {tag: [rest for _, rest in sorted(found.items())] for tag, found in lines.items()}
    hypotheses, detokenised = ([line.partition("\t")[2] for line in texts[tag]] for tag in "HD")
    return Generated(texts["S"] or None, texts["T"] or None, hypotheses, detokenised)


def _check_complete(path: str, lines: Dict[str, Dict[int, str]]) -> None:
    """Every sentence from 0 to the last has its H- and D-line, and S- and T-lines if any has."""
    if not lines["H"] or not lines["D"]:
        raise UsageError(f"{path} holds no hypotheses (H- and D-lines): give what fairseq-generate printed without --quiet")
    size = 1 + max(max(found) for found in lines.values() if found)
    for tag, found in lines.items():
        if 0 < len(found) < size:
            first = next(sentence for sentence in range(size) if sentence not in found)
            raise UsageError(
                f"{path}: {size - len(found)} of {size} sentences have no {tag}-line, the first is sentence {first}: give the whole "
                "output; --task earm_translation translates every sentence"
            )
