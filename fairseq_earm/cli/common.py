"""What the commands have in common: where they run, the text's dictionary, and how results are written."""
from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import os
import sys
from typing import Iterator, Optional

import torch
from fairseq.data import Dictionary

from fairseq_earm.errors import UsageError, reason
from fairseq_earm.evaluation.data_folder import check_data_folder
from fairseq_earm.evaluation.whole_file import is_device, whole_file


# How fairseq joins the pieces of words (`data_utils.post_process`).
POST_PROCESS = ("@@ ", "subword_nmt", "sentencepiece", "wordpiece", "letter", "silence", "_EOW", "none")


@contextlib.contextmanager
def interruptible(more: str = "") -> Iterator[None]:
    """Have Ctrl-C end a command with one line that says how to go on, and no traceback; a decorator of its `main`.

    The interrupt itself goes on its way: a process that ends by the signal also ends the shell's loop that started it.

    Args:
        more: what the same command does when it is started again.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.excepthook = functools.partial(_say_interrupted, f"start the same command again{more}")
        raise


def _say_interrupted(how: str, kind: type, *rest) -> None:
    """Python's last word on an error that nobody caught."""
    if not issubclass(kind, KeyboardInterrupt):
        return sys.__excepthook__(kind, *rest)
    after_progress = "\n" if sys.stderr.isatty() else ""
    print(f"{after_progress}fairseq-earm: interrupted: {how}", file=sys.stderr)


def device(args: argparse.Namespace) -> torch.device:
    """The GPU where there is one and --cpu is not given."""
    return torch.device("cpu" if args.cpu or not torch.cuda.is_available() else "cuda")


def dtype(args: argparse.Namespace) -> torch.dtype:
    """What --dtype names."""
    return getattr(torch, args.dtype)


def text_dictionary(data: str) -> Dictionary:
    """The dictionary of a folder with text of one language.

    Raises:
        UsageError: the folder has none, or a damaged one; there is no such folder, or several are named.
    """
    check_data_folder(data)
    path = os.path.join(data, "dict.txt")
    if not os.path.isfile(path):
        raise UsageError(f"{data} has no dict.txt: give a folder that fairseq-preprocess --only-source wrote")
    try:
        return Dictionary.load(path)
    except Exception as error:  # fairseq tells a line's faults by many kinds of errors
        raise UsageError(f"{path} is no dictionary of fairseq ({reason(error)}): preprocess the text again") from None


def text_task(dictionary: Dictionary, data: str) -> argparse.Namespace:
    """As much of a task as checkpoints of models of this text are checked against."""
    return argparse.Namespace(
        source_dictionary=dictionary, target_dictionary=dictionary, args=argparse.Namespace(data=data)
    )


def drawing(module: str, what: str, remedy: str = "install it"):
    """A module of evaluation/ that draws with matplotlib, which need not be installed.

    Args:
        module: its name.
        what: of the command asks for a drawing, and the verb: "--plot draws".
        remedy: what to do without matplotlib.
    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        return importlib.import_module(f"fairseq_earm.evaluation.{module}")
    except ImportError:
        raise UsageError(f"{what} with matplotlib, which is not installed: {remedy}") from None


def check_json(path: Optional[str], *, flag: str = "--json") -> None:
    """Refuse, before any work, a file for results that cannot be written for want of a folder, or of leave to write there."""
    if not path:
        return
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):
        raise UsageError(f"{flag} {path}: there is no such folder; create it first")
    if os.path.isdir(path):
        raise UsageError(f"{flag} {path} cannot be written: it is a folder; give a file")
    if not os.access(path if is_device(path) else folder, os.W_OK):
        raise UsageError(f"{flag} {path} cannot be written: {folder} may not be written to; give another, or leave to write")


def check_png(path: str, *, flag: str) -> None:
    """`check_json` of a figure, which is a PNG file."""
    if not path.lower().endswith(".png"):
        raise UsageError(f"{flag} {path}: the figure is a PNG file; give a name that ends in .png")
    check_json(path, flag=flag)


def check_seed(seed: int) -> None:
    """Refuse what numpy or torch takes for no seed."""
    if not 0 <= seed < 2**63:
        raise UsageError(f"--seed {seed}: give 0 or more, below 2^63")


def write_json(path: str, report: dict) -> None:
    """`write_text` of a report."""
    write_text(path, json.dumps(report, indent=2), flag="--json")


def write_text(path: str, content: str, *, flag: str = "--output") -> None:
    """Write a file as a whole: a command that is killed leaves no half of it.

    Args:
        flag: that the path was given by.
    Raises:
        UsageError: it cannot be written.
    """
    with writing(flag, path), whole_file(path) as file:
        file.write(content.encode("utf-8", "replace"))


@contextlib.contextmanager
def writing(flag: str, path: str) -> Iterator[None]:
    """Say in one line what the file system refuses meanwhile.

    Raises:
        UsageError: names the flag, its path and the remedy.
    """
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        remedy = "" if isinstance(error, BlockingIOError) else "; make room or leave to write, or give another"
        raise UsageError(f"{flag} {path} cannot be written: {why}{remedy}") from None
