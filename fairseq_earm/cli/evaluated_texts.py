"""The translations and references that fairseq-earm-evaluate compares: read, checked against each other, made alike."""
from __future__ import annotations

import argparse
import re
from typing import Callable, Dict, Iterable, List, NamedTuple, Optional, Sequence

from sacrebleu.metrics import BLEU

from fairseq_earm.errors import UsageError
from fairseq_earm.evaluation.generated import is_generated, read_generated, text_lines

SUBWORDS = re.compile(r"@@( |$)|▁")
UNKNOWN = "<<unk>>"  # how fairseq prints a reference's word outside the dictionary


class Texts(NamedTuple):
    """S sentences as they are scored.

    Attributes:
        systems: name → for each seed its S translations.
        references: one or several reference translations, each of S texts.
        tokenizer: sacreBLEU's, chosen by the user or by how the references look.
        notes: what the reader of the scores should know.
    """

    systems: Dict[str, List[List[str]]]
    references: List[List[str]]
    tokenizer: str
    notes: List[str]


class _File(NamedTuple):
    """Texts of one file, and the references that it brought."""

    path: str
    texts: List[str]
    references: Optional[List[str]] = None


def read_texts(args: argparse.Namespace) -> Texts:
    """Read all files that the flags name.

    Raises:
        UsageError: a file that cannot be read, is empty or holds subwords; files about different sentences; no references.
    """
    systems = {name: [_read(path) for path in paths] for name, *paths in args.system}
    files = [file for seeds in systems.values() for file in seeds]
    given = [_read_reference(path) for path in args.references or ()]
    for file in (*files, *given):
        _check_subwords(file)
        _check_size(file, files[0])
    references = [file.texts for file in given] or [_t_lines(files)]
    texts = {name: [file.texts for file in seeds] for name, seeds in systems.items()}
    if args.detokenize:
        detokenise = _detokeniser(args.detokenize)
        texts = {name: [detokenise(own) for own in seeds] for name, seeds in texts.items()}
        references = references if given else [detokenise(own) for own in references]
    tokenised = looks_tokenised(line for own in references for line in own)
    tokenizer = args.tokenize or ("none" if tokenised else BLEU.TOKENIZER_DEFAULT)
    return Texts(texts, references, tokenizer, _notes(args, texts, references, tokenizer))


def looks_tokenised(texts: Iterable[str]) -> Optional[bool]:
    """Whether more commas and full stops stand apart than at the end of a word; None of texts without any."""
    words = [word for text in texts for word in text.split() if word[-1] in ".,"]
    return 2 * sum(not word.strip(".,") for word in words) > len(words) if words else None


def _read(path: str) -> _File:
    """D-lines and T-lines of fairseq-generate, which detokenises both alike; or plain text."""
    lines = list(text_lines(path))
    if not lines:
        raise UsageError(f"{path} holds no sentences")
    if not is_generated(lines):
        return _File(path, lines)
    generated = read_generated(path, lines)
    return _File(path, generated.detokenised, generated.references)


def _read_reference(path: str) -> _File:
    lines = list(text_lines(path))
    if is_generated(lines):
        raise UsageError(f"--references {path} is what fairseq-generate printed: give plain text, a sentence a line")
    return _File(path, lines)


def _check_subwords(file: _File) -> None:
    """A stray mark may be text; marks in more than a line of a hundred are not."""
    marked = [line for line in file.texts if SUBWORDS.search(line)]
    if 100 * len(marked) > len(file.texts):
        raise UsageError(
            f"{file.path}: {len(marked)} of {len(file.texts)} sentences are in subwords, as {marked[0][:40]!r}: generate with "
            "--remove-bpe (of SentencePiece, --remove-bpe sentencepiece)"
        )


def _check_size(file: _File, first: _File) -> None:
    if len(file.texts) != len(first.texts):
        raise UsageError(
            f"{file.path} has {len(file.texts)} sentences and {first.path} {len(first.texts)}: give translations of the same text"
        )


def _t_lines(files: Sequence[_File]) -> List[str]:
    """The references that the files bring, which must be the same in all that bring some."""
    found = [file for file in files if file.references]
    if not found:
        raise UsageError("no file holds T-lines: give the reference translation with --references FILE")
    first, *others = found
    for file in others:
        for sentence, (own, expected) in enumerate(zip(file.references, first.references)):
            if own != expected:
                raise UsageError(
                    f"{file.path} has other references than {first.path}, first in sentence {sentence}, {own[:60]!r} for "
                    f"{expected[:60]!r}: generate from the same data with the same --remove-bpe, --bpe and --tokenizer, or give "
                    "--references"
                )
    _check_subwords(_File(f"{first.path} (T-lines)", first.references))
    return first.references


def _detokeniser(language: str) -> Callable[[Sequence[str]], List[str]]:
    try:
        from sacremoses import MosesDetokenizer
    except ImportError:
        raise UsageError(f"--detokenize {language}: sacremoses is not installed: pip install sacremoses") from None
    moses = MosesDetokenizer(lang=language)
    return lambda texts: [moses.detokenize(text.split()) for text in texts]


def _notes(
    args: argparse.Namespace, systems: Dict[str, List[List[str]]], references: List[List[str]], tokenizer: str
) -> List[str]:
    notes = []
    lines = [line for own in references for line in own]
    tokenised = looks_tokenised(lines)
    if tokenised:
        notes.append(
            f"The references look tokenised: BLEU (tok:{tokenizer}) does not compare with published sacreBLEU scores, which are of "
            "detokenised text. --detokenize LANG, or fairseq-generate with --tokenizer moses, gives such."
        )
    for name, seeds in systems.items():
        if {looks_tokenised(line for own in seeds for line in own), tokenised} == {True, False}:
            looks = "detokenised" if tokenised else "tokenised"
            notes.append(f"{name} looks {looks} and the references do not: its scores are too low. Make them alike.")
    unknown = 0 if args.references else sum(UNKNOWN in line for line in lines)
    if unknown:
        notes.append(
            f"{unknown} references hold {UNKNOWN}, words outside the dictionary, which no translation should match: give the text "
            "itself with --references."
        )
    letters = re.findall(r"[^\W\d_]", "".join(lines))
    foreign = sum(not letter.isascii() for letter in letters)
    if "rouge" in args.metrics and 100 * foreign > len(letters):
        share = f"{100 * foreign / len(letters):.0f} %"
        notes.append(f"{share} of the references' letters are outside a-z: ROUGE takes them for spaces.")
    return notes
