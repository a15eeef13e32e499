"""The history of a training run, from fairseq's logs in any of its formats or from what --tensorboard-logdir wrote.

A history is records by kind: "train_inner" (one an interval), "train" (one an epoch, its average) and one kind for each set
that was validated, by its name ("valid", "test", …). A record is {"num_updates", "epoch", "loss", …}, all floats. fairseq's
`loss`, `nll_loss` and `ppl` are in base 2, per token.
"""
from __future__ import annotations

import json
import math
import os
import re
import sys
from bisect import bisect_left
from pathlib import Path
from typing import Dict, Iterable, Iterator, List, Optional, Sequence, Set, Tuple, Union

from fairseq_earm.errors import UsageError

PathLike = Union[str, Path]
Record = Dict[str, float]
History = Dict[str, List[Record]]

INNER, EPOCHS = "train_inner", "train"
# Where in the training a record stands; numbers that are no such place, as NaN, are left out.
PLACES, LAST_PLACE = ("num_updates", "epoch", "update"), 1e15
# A record as fairseq writes it: JSON; an interval as plain text; the end of an epoch or a validation as plain text.
JSON_RECORD = re.compile(r"(?:(?<![\w.-])([\w.-]+)[ |:]+)?(\{\".*\})\s*$")
INTERVAL = re.compile(r"\bepoch (\d{1,9}):\s+(\d{1,15}) / (\d{1,15}) (\w+=.*)$")
AVERAGES = re.compile(r"\b(?:epoch (\d{1,9}) \| )?(?:valid on '([^']+)' subset \| )?(loss \S+ \| .*)$")
LONGEST = 1 << 16  # characters of a line; a record has some thousand
EVENTS = "events.out.tfevents."


def read_log(path: PathLike) -> History:
    """The records of one log, by kind, in the order of their updates; lines that are no records are passed over.

    Where training was begun again from an earlier update, what had been logged beyond it is dropped: a run that was killed
    and resumed into the same log has one history.

    Raises:
        UsageError: the log cannot be read.
    """
    return _collect(_records(path))


def _records(path: PathLike) -> Iterator[Tuple[str, Record]]:
    """Kind and values of every record of a log, in the order of its lines."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                record = _record(line)
                if record:
                    yield record
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}; give a log of fairseq-train") from None


def _collect(records: Iterable[Tuple[str, Record]]) -> History:
    """Records in the order they were written, without those that others replace.

    fairseq opens --log-file anew each epoch, and every line comes once more from then on: of the same kind and update
    the last record counts.
    """
    written: List[Tuple[float, str, Record]] = []
    for kind, record in records:
        written.append((record.get("num_updates", written[-1][0] if written else 0.0), kind, record))
    history: History = {}
    newest: Dict[str, float] = {}
    for update, kind, record in _without_abandoned(written):
        same = history.setdefault(kind, [])
        if "num_updates" in record and newest.get(kind) == update:
            same.pop()
        same.append(record)
        newest[kind] = update
    return history


def _without_abandoned(written: List[Tuple[float, str, Record]]) -> List[Tuple[float, str, Record]]:
    """Without records beyond an update from which training was begun again later."""
    kept, least = [], math.inf
    for item in reversed(written):
        if item[0] <= least:
            least = item[0]
            kept.append(item)
    return kept[::-1]


def _record(line: str) -> Optional[Tuple[str, Record]]:
    """Kind and values of a line that is a record."""
    if len(line) > LONGEST:
        return None
    for pattern, read in ((JSON_RECORD, _from_json), (INTERVAL, _from_interval), (AVERAGES, _from_averages)):
        match = pattern.search(line)
        if match:
            return read(match)
    return None


def _from_json(match) -> Optional[Tuple[str, Record]]:
    """Records of an epoch or of a validation have their kind before every key; --log-file writes it nowhere else."""
    tag = match.group(1)
    try:
        values = json.loads(match.group(2))
    except (ValueError, RecursionError):
        return None
    keys = [key for key in values if key not in ("epoch", "update")]
    tagged = bool(tag and keys) and all(key.startswith(f"{tag}_") for key in keys)
    kind = tag if tagged else os.path.commonprefix(keys).rpartition("_")[0]
    record = _numbers((key[len(kind) + 1 :] if kind and key in keys else key, value) for key, value in values.items())
    if not (tagged or ("loss" if kind else "num_updates") in record):
        return None
    return kind or INNER, record


def _from_interval(match) -> Optional[Tuple[str, Record]]:
    epoch, done, of = map(int, match.group(1, 2, 3))
    if of == 0:
        return None
    values = _numbers(part.partition("=")[::2] for part in match.group(4).split(", "))
    return INNER, {"epoch": float(epoch), "update": round(epoch - 1 + done / of, 3), **values}


def _from_averages(match) -> Optional[Tuple[str, Record]]:
    epoch, subset, averages = match.groups()
    if epoch is None and subset is None:
        return None
    values = _numbers(part.strip().partition(" ")[::2] for part in averages.split(" | "))
    return subset or EPOCHS, {**({} if epoch is None else {"epoch": float(epoch)}), **values}


def _numbers(values: Iterable[Tuple[str, object]]) -> Record:
    """Those values that are numbers, or their text; a long log has each key a million times, and keeps one."""
    found = {}
    for key, value in values:
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            continue
        if key not in PLACES or 0 <= number <= LAST_PLACE:
            found[sys.intern(key)] = number
    return found


def read_tensorboard(folder: PathLike) -> History:
    """The records of a folder that `fairseq-train --tensorboard-logdir` wrote: a folder of each kind with event files.

    TensorBoard's files hold no epochs: the first record of kind "train" is taken for the end of epoch 1, and so on.

    Raises:
        UsageError: the package tensorboard is not installed.
    """
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        raise UsageError(f"{folder} is read with tensorboard, which is not installed: install it, or give a text log") from None
    scalars = []
    for kind in event_folders(folder):
        events = EventAccumulator(str(Path(folder) / kind), size_guidance={"scalars": 0}).Reload()
        scalars += [(e.wall_time, kind, e.step, key, e.value) for key in events.Tags()["scalars"] for e in events.Scalars(key)]
    history = _collect(_steps(sorted(scalars, key=lambda scalar: scalar[0])))
    _count_epochs(history)
    return history


def event_folders(folder: PathLike) -> List[str]:
    """Names of the folders in a folder that hold TensorBoard's files."""
    return sorted({path.parent.name for path in Path(folder).glob(f"*/{EVENTS}*")})


def _steps(scalars: Sequence[tuple]) -> List[Tuple[str, Record]]:
    """Records from single scalars in the order they were written."""
    open_records: Dict[str, Record] = {}
    order: List[Tuple[str, Record]] = []
    for _, kind, step, key, value in scalars:
        record = open_records.get(kind)
        if record is None or record["num_updates"] != step or key in record:
            record = open_records[kind] = {"num_updates": float(step)}
            order.append((kind, record))
        record[key] = value
    return order


def _count_epochs(history: History) -> None:
    ends = sorted(record["num_updates"] for record in history.get(EPOCHS, []))
    if not ends:
        return
    for records in history.values():
        for record in records:
            record["epoch"] = 1.0 + bisect_left(ends, record["num_updates"])


def read_run(paths: Sequence[PathLike]) -> History:
    """The one history of a run from its logs, in the order they were written, or folders of --tensorboard-logdir.

    A later log replaces what earlier ones say about the updates it covers.

    Raises:
        UsageError: a log cannot be read, or has no records of training.
    """
    whole: History = {}
    for path in paths:
        history = read_tensorboard(path) if os.path.isdir(path) else read_log(path)
        updates = [record["num_updates"] for records in history.values() for record in records if "num_updates" in record]
        if not updates:
            raise UsageError(f"{path} holds no records of training: give what fairseq-train logged with --log-format json or simple")
        first, last = min(updates), max(updates)
        for kind in dict.fromkeys([*whole, *history]):
            earlier = [r for r in whole.get(kind, []) if not first <= r.get("num_updates", -1.0) <= last]
            whole[kind] = sorted(earlier + history.get(kind, []), key=lambda record: record.get("num_updates", -1.0))
    return {kind: records for kind, records in whole.items() if records}


def find_logs(folder: PathLike) -> List[Path]:
    """The logs of the run whose --save-dir is this folder, in the order they were written.

    They are looked for where they usually go: FOLDER/*.log and, beside it, FOLDER.log. Where there is none, the folders
    with TensorBoard's files: FOLDER itself and those in it.

    Raises:
        UsageError: there is no such folder.
    """
    if not os.path.isdir(folder):
        raise UsageError(f"{folder}: there is no such folder; give the --save-dir of a training run")
    folder = Path(folder)
    beside = Path(os.path.abspath(folder) + ".log")
    logs = [path for path in (*folder.glob("*.log"), beside) if path.is_file() and is_training_log(path)]
    if logs:
        return sorted(logs, key=modified)
    return [path for path in (folder, *sorted(folder.iterdir())) if path.is_dir() and event_folders(path)]


def modified(path: PathLike) -> float:
    """When a file was last written to; 0 where that cannot be known: a link to nothing, or a file removed meanwhile."""
    try:
        return os.stat(path).st_mtime
    except OSError:
        return 0.0


def is_training_log(path: PathLike) -> bool:
    """Whether there is a record of training in a log."""
    return any(kind in (INNER, EPOCHS) for kind, _ in _records(path))


def earm_start(history: History) -> Optional[Record]:
    """The first record with E-ARM in it, of the intervals or else of the epochs; None for a run without."""
    return next((record for kind in (INNER, EPOCHS) for record in history.get(kind, []) if "earm_loss" in record), None)


def earm_entry(history: History, x: str = "num_updates") -> Optional[float]:
    """Update, or another x, where E-ARM enters; None for a run without, or with it from its first record on."""
    start = earm_start(history)
    first = min((record[x] for kind in (INNER, EPOCHS) for record in history.get(kind, []) if x in record), default=math.nan)
    return start[x] if start is not None and start.get(x, first) > first else None


def validated_kinds(history: History) -> List[str]:
    """The sets that were validated, by name, in the order of their first record."""
    return [kind for kind in history if kind not in (INNER, EPOCHS)]


def logged_names(history: History) -> Set[str]:
    """The keys that any record has."""
    return {name for records in history.values() for name in set().union(*records)}


def cross_entropy_key(history: History) -> str:
    """Where a run logs its cross-entropy: `nll_loss`, or `loss` where the criterion is cross-entropy itself and logs that alone."""
    return "nll_loss" if "nll_loss" in logged_names(history) else "loss"


def is_residual(history: History) -> bool:
    """Whether an energy network was trained by `residual_nce`, whose loss is per sequence."""
    return any(name.startswith("nce_") for name in logged_names(history))


def series(records: Sequence[Record], key: str, x: str = "num_updates") -> Tuple[List[float], List[float]]:
    """Updates, or another x, and values of one key, where both were logged."""
    points = [(record[x], record[key]) for record in records if key in record and x in record]
    return [x for x, _ in points], [y for _, y in points]
