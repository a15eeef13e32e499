"""What a training run left behind: its checkpoint's settings, its logs, and the results and samples beside them."""
from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import statistics
from pathlib import Path
from pickle import UnpicklingError
from typing import Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch

from fairseq_earm.compat_loading import checks_what_it_loads, refused
from fairseq_earm.errors import UsageError, reason
from fairseq_earm.evaluation.generated import is_generated, text_lines
from fairseq_earm.evaluation.page import PNG
from fairseq_earm.evaluation.training_log import EPOCHS, INNER, History, PathLike, find_logs, modified, read_run

# Groups of a configuration whose `_name` is a flag of fairseq-train.
NAMED = {"model": "arch", **{g: g for g in ("task", "criterion", "optimizer", "lr_scheduler", "scoring", "bpe", "tokenizer")}}
# What fairseq-train says once about a run, beside its records.
FACTS = {
    "parameters": re.compile(r"num\. shared model params: ([\d,]+)"),
    "devices": re.compile(r"training on (\d+) devices"),
    "gpu": re.compile(r"rank +\d+: capabilities.*; name = (.+?)\s*$"),
    "model": re.compile(r"\| model: (\w+)\s*$"),
    "criterion": re.compile(r"\| criterion: (\w+)\s*$"),
}
# Of a setting what is shown: characters, items with what stands between them, and the largest number in digits.
LONGEST, MOST_PIECES, LARGEST = 10_000, 400, 1 << 63
DATE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d):\d\d \| ")


class Checkpoint(NamedTuple):
    """Of a checkpoint what a report needs.

    Attributes:
        settings: flags of fairseq-train without dashes → values.
        values: numbers in the model's state, those that several tensors share counted once.
        updates: how many it was trained for; None if it does not say.
    """

    path: Path
    settings: Dict[str, object]
    values: int
    updates: Optional[int]


class Run(NamedTuple):
    """One run.

    Attributes:
        logs: what its history was read from; empty where nothing was found.
        facts: see `FACTS`; those the logs state, and "begun" and "ended", the dates of their first and last lines.
        results: files in JSON with what they hold.
        generated: outputs of fairseq-generate.
        notes: what could not be read, a sentence each.
    """

    name: str
    folder: Path
    logs: List[Path]
    history: History
    facts: Dict[str, str]
    checkpoint: Optional[Checkpoint]
    results: List[Tuple[Path, object]]
    generated: List[Path]
    pictures: List[Path]
    notes: List[str]

    def setting(self, name: str) -> object:
        """A flag's value; None without a checkpoint or where it knows no such flag."""
        return self.checkpoint.settings.get(name) if self.checkpoint else None


def read_run_folder(folder: PathLike, name: str, logs: Sequence[PathLike] = ()) -> Run:
    """Everything about one run, from its --save-dir and from what stands beside it as FOLDER.log, FOLDER.json, FOLDER.test.log …

    Args:
        logs: where the logs are, if not in the usual places (see `find_logs`).
    Raises:
        UsageError: no such folder, or neither a checkpoint nor a log.
    """
    if not os.path.isdir(folder):
        raise UsageError(f"{folder}: there is no such folder; give the --save-dir of a run")
    try:
        return _read(Path(folder), name, [Path(log) for log in logs])
    except OSError as error:
        why = error.strerror or error
        where = "" if error.filename is None else f" ({error.filename})"
        raise UsageError(f"{folder} cannot be read: {why}{where}; give leave to read it, or another folder") from None


def _read(folder: Path, name: str, logs: List[Path]) -> Run:
    notes: List[str] = []
    paths = logs or find_logs(folder)
    checkpoint = _newest_checkpoint(folder, notes)
    if not paths and checkpoint is None:
        raise UsageError(
            f"{folder} has neither a checkpoint nor a log of fairseq-train, and there is no {folder}.log: give the --save-dir of a "
            f"run, and with --log {name} FILE what it logged"
        )
    if not paths:
        notes.append(
            f"No log was found, so there are no curves: name it with --log {name} FILE. Looked for {folder}/*.log, {folder}.log and "
            "folders of --tensorboard-logdir in it."
        )
    files = _files(folder)
    return Run(
        name, folder, paths, read_run(paths), _facts(paths), checkpoint, _json_files(files, notes),
        [path for path in files if path.suffix in (".out", ".log", ".txt") and _is_generated(path)],
        [path for path in files if path.suffix.lower() == ".png" and _is_png(path)], notes,
    )


def _files(folder: Path) -> List[Path]:
    """Files in the folder, and those beside it that carry its name."""
    folder = folder.absolute()
    beside = (path for path in folder.parent.iterdir() if path.name.startswith(folder.name + "."))
    return sorted(path for path in (*folder.iterdir(), *beside) if path.is_file())


def _newest_checkpoint(folder: Path, notes: List[str]) -> Optional[Checkpoint]:
    """The last one; if that cannot be read, the best, then any other, the newest first."""
    first = ["checkpoint_last.pt", "checkpoint_best.pt"]
    others = sorted(folder.glob("checkpoint*.pt"), key=modified, reverse=True) if folder.is_dir() else []
    for path in sorted(others, key=lambda path: first.index(path.name) if path.name in first else len(first)):
        try:
            return _read_checkpoint(path)
        except UnpicklingError as error:
            notes.append(f"{path} cannot be read ({refused(error)}).")
        except Exception as error:  # whatever stands in it
            notes.append(f"{path} cannot be read ({reason(error)}).")
    return None


def _read_checkpoint(path: Path) -> Checkpoint:
    state = torch.load(path, map_location="cpu", weights_only=checks_what_it_loads())
    groups = state["cfg"] if state.get("cfg") is not None else {"args": state["args"]}
    tensors = {(tensor.data_ptr(), tensor.shape): tensor.numel() for tensor in state["model"].values() if tensor.dim() > 0}
    history = state.get("optimizer_history") or [{}]
    updates = _shown(history[-1].get("num_updates"))
    return Checkpoint(path, _settings(groups), sum(tensors.values()), updates if isinstance(updates, int) else None)


def _settings(groups: dict) -> Dict[str, object]:
    found: Dict[str, object] = {}
    # Models that are not described by a dataclass repeat everybody's flags, so what they say counts last.
    for group, values in sorted(groups.items(), key=lambda item: isinstance(item[1], argparse.Namespace)):
        values = vars(values) if isinstance(values, argparse.Namespace) else values
        if not hasattr(values, "items"):
            continue
        if group in NAMED and values.get("_name"):
            found[NAMED[group]] = _shown(values["_name"])
        for name, value in values.items():
            if not name.startswith("_"):
                found.setdefault(name, _shown(value))
    return found


def _shown(value: object) -> object:
    """A setting as a report shows it: numbers as they are, of everything else the text as far as it is not too long."""
    if value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) <= LARGEST):
        return value
    pieces = list(itertools.islice(_pieces(value), MOST_PIECES))
    more = "…" if len(pieces) == MOST_PIECES else ""
    if isinstance(value, (list, tuple)):  # shown without its brackets
        pieces = pieces[1:] if more else pieces[1:-1]
    return "".join(pieces)[:LONGEST] + more


def _pieces(value: object) -> Iterator[str]:
    """The text of a setting, piece by piece: a small checkpoint may nest lists too deep, or too often, for `str`."""
    value = vars(value) if isinstance(value, argparse.Namespace) else value
    if isinstance(value, (list, tuple, dict, set, frozenset)):
        yield "["
        for number, item in enumerate(value.items() if isinstance(value, dict) else value):
            yield ", " if number else ""
            yield from _pieces(item)
        yield "]"
    elif isinstance(value, int) and abs(value) > LARGEST:
        yield "a number too large to show"
    else:
        yield str(value)[:LONGEST]


def _is_png(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(PNG)) == PNG
    except OSError:
        return False


def _json_files(files: Sequence[Path], notes: List[str]) -> List[Tuple[Path, object]]:
    found = []
    for path in files:
        if path.suffix == ".json":
            try:
                found.append((path, json.loads(path.read_text(encoding="utf-8"))))
            except (OSError, ValueError, RecursionError):
                notes.append(f"{path} is not JSON that can be read.")
    return found


def _is_generated(path: Path) -> bool:
    try:
        return is_generated(text_lines(str(path)))
    except UsageError:
        return False


def _facts(logs: Sequence[Path]) -> Dict[str, str]:
    """The last word of the logs on each of `FACTS`, and the dates."""
    found: Dict[str, str] = {}
    for path in filter(Path.is_file, logs):
        with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                date = DATE.match(line)
                if date:
                    found.setdefault("begun", date.group(1))
                    found["ended"] = date.group(1)
                for name, pattern in FACTS.items():
                    match = pattern.search(line)
                    if match:
                        found[name] = match.group(1)
    return found


def wall_seconds(history: History) -> Optional[float]:
    """Time that the run took, over its restarts, each of which counts from 0; None where it was not logged."""
    records = sorted(
        (record for kind in (INNER, EPOCHS) for record in history.get(kind, []) if "wall" in record),
        key=lambda record: record.get("num_updates", 0.0),
    )
    if not records:
        return None
    walls = [record["wall"] for record in records]
    return walls[-1] + sum(before for before, after in zip(walls, walls[1:]) if after < before)


def update_seconds(history: History, earm: bool) -> Optional[float]:
    """Median seconds of an update over the intervals (or epochs) with or without E-ARM; None where there are none."""
    records = history.get(INNER) or history.get(EPOCHS, [])
    rates = [record["ups"] for record in records if ("earm_loss" in record) == earm and record.get("ups", 0) > 0]
    return 1 / statistics.median(rates) if rates else None


def best_record(history: History, kind: str, key: str) -> Optional[dict]:
    """The record of a validated set with the lowest value."""
    records = [record for record in history.get(kind, []) if record.get(key) == record.get(key) and key in record]
    return min(records, key=lambda record: record[key]) if records else None
