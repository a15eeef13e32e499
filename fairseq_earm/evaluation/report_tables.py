"""What is known about training runs, as tables: their figures side by side, their settings, where they ran."""
from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Callable, Dict, List, Optional, Sequence

import torch

from fairseq_earm.ebm.objectives import control_named
from fairseq_earm.evaluation.page import table
from fairseq_earm.evaluation.run_folder import Run, best_record, update_seconds, wall_seconds
from fairseq_earm.evaluation.training_log import EPOCHS, cross_entropy_key, earm_entry, earm_start, validated_kinds

Value = Callable[[Run], Optional[str]]
# What one run's settings show first, beside the flags of the plugin; several runs show first where they differ.
MAIN = (
    "arch", "task", "criterion", "data", "optimizer", "lr", "lr_scheduler", "warmup_updates", "max_tokens", "batch_size",
    "update_freq", "max_epoch", "max_update", "dropout", "weight_decay", "clip_norm", "label_smoothing", "seed",
    "finetune_from_model", "restore_file",
)
OWN = ("earm_", "nce_")
SCHEDULE = "scheduled_sampling"
NONE = "–"


def summary(runs: Sequence[Run]) -> str:
    """A row for each figure that is known of any run, a column for each run."""
    rows: Dict[str, Value] = {
        "architecture": lambda run: run.setting("arch") or run.facts.get("model"),
        "parameters": _parameters,
        "task": lambda run: run.setting("task"),
        "criterion": lambda run: run.setting("criterion") or run.facts.get("criterion"),
        "updates": lambda run: _count(_most(run, "num_updates") or (run.checkpoint and run.checkpoint.updates)),
        "epochs": lambda run: _count(_most(run, "epoch")),
    }
    first, *others = dict.fromkeys(kind for run in runs for kind in validated_kinds(run.history)) or [None]
    if first:
        rows[f"best {first}"] = lambda run: _validated(run, _best(run, first))
    for kind in others:  # not its own best: that would be a choice by the test set
        rows[f"{kind} at the best {first}"] = lambda run, kind=kind: _validated(run, _beside(run, kind, _best(run, first)))
    for kind in [first, *others] if first else []:
        rows[f"last {kind}"] = lambda run, kind=kind: _validated(run, (run.history.get(kind) or [None])[-1])
    rows["E-ARM"] = _entry
    rows["DV bound, last epoch"] = _last_dv
    rows["wall time"] = lambda run: _duration(wall_seconds(run.history))
    rows["seconds per update"] = lambda run: _seconds(update_seconds(run.history, earm=False))
    rows["seconds per update, with E-ARM"] = lambda run: _seconds(update_seconds(run.history, earm=True))
    cells = [[name, *(value(run) or NONE for run in runs)] for name, value in rows.items()]
    return table(["", *(run.name for run in runs)], [row for row in cells if any(cell != NONE for cell in row[1:])])


def _most(run: Run, key: str) -> Optional[float]:
    return max((record[key] for records in run.history.values() for record in records if key in record), default=None)


def _best(run: Run, kind: str) -> Optional[dict]:
    return best_record(run.history, kind, _key(run))


def _beside(run: Run, kind: str, record: Optional[dict]) -> Optional[dict]:
    """The record of another set at the same update."""
    update = record and record.get("num_updates")
    return next((other for other in run.history.get(kind, []) if update is not None and other.get("num_updates") == update), None)


def _last_dv(run: Run) -> Optional[str]:
    return next((f"{record['earm_dv']:+.4f}" for record in run.history.get(EPOCHS, [])[-1:] if "earm_dv" in record), None)


def _parameters(run: Run) -> Optional[str]:
    if "parameters" in run.facts or run.checkpoint is None:
        return run.facts.get("parameters")
    return f"{run.checkpoint.values:,} values in the checkpoint"


def _count(value: Optional[float]) -> Optional[str]:
    return None if value is None else f"{value:,.0f}"


def _key(run: Run) -> str:
    """What validation is judged by."""
    validated = {kind: run.history[kind] for kind in validated_kinds(run.history)}
    images = any("bits_per_dim" in record for records in validated.values() for record in records)
    return "bits_per_dim" if images else cross_entropy_key(validated)


def _validated(run: Run, record: Optional[dict]) -> Optional[str]:
    key = _key(run)
    if record is None or key not in record:
        return None
    at = f" at update {record['num_updates']:,.0f}" if "num_updates" in record else ""
    return f"{record[key]:.3f} {key}{at}"


def _entry(run: Run) -> Optional[str]:
    start = earm_start(run.history)
    if start is None:
        return None
    control = control_named(run.setting("earm_control"))
    what = "" if control == "none" else f"control ({control}), "
    weight = run.setting("earm_weight")
    what += "" if not isinstance(weight, (int, float)) else f"λ = {weight:g}, "
    entry = earm_entry(run.history)
    when = "from the first record" if entry is None else f"logged from update {entry:,.0f}"
    return f"{what}{when}, epoch {start['epoch']:.0f}" if "epoch" in start else what + when


def _duration(seconds: Optional[float]) -> Optional[str]:
    if seconds is None:
        return None
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _seconds(seconds: Optional[float]) -> Optional[str]:
    return None if seconds is None else f"{seconds:.3g}"


def settings(runs: Sequence[Run]) -> str:
    """Flags of fairseq-train: those in which the runs differ, or the main ones of a single run; the plugin's own; all to unfold."""
    known = [run for run in runs if run.checkpoint]
    if not known:
        return "<p>No checkpoint, so the settings are unknown.</p>"
    names = sorted({name for run in known for name in run.checkpoint.settings})
    header = ["flag", *(run.name for run in known)]
    rows = {name: [_flag(name), *(_value(run, name) for run in known)] for name in names}
    scheduled = any(run.setting(SCHEDULE) not in (None, "none") for run in known)
    own = [name for name in names if name.startswith((*OWN, SCHEDULE) if scheduled else OWN)]
    if len(known) > 1:
        first = [name for name in names if len({value for value in rows[name][1:] if value}) > 1]
        title = "Flags in which the runs differ"
    else:
        first, title = [name for name in MAIN if rows.get(name, ["", NONE])[1] != NONE], "Main flags"
    parts = [table(header, [rows[name] for name in first], title) if first else f"<p>{title}: none.</p>"]
    if own:
        parts.append(_folded(f"{len(own)} flags of this plugin", table(header, [rows[name] for name in own])))
    whole = table(header, rows.values(), f"{NONE}: not given; empty: the run has no such flag")
    return "\n".join([*parts, _folded(f"All {len(rows)} settings", whole)])


def _folded(title: str, content: str) -> str:
    return f"<details>\n<summary>{title}</summary>\n{content}\n</details>"


def _flag(name: str) -> str:
    return name if name == "data" else "--" + name.replace("_", "-")


def _value(run: Run, name: str) -> str:
    if name not in run.checkpoint.settings:
        return ""
    value = run.setting(name)
    return NONE if value is None or value == "" else str(value)


def environment(runs: Sequence[Run]) -> str:
    """Where and when the runs were trained as far as is known, and where the page is written."""
    header = ["", *(run.name for run in runs)]
    rows: Dict[str, Value] = {
        "folder": lambda run: str(run.folder),
        "checkpoint": lambda run: run.checkpoint and run.checkpoint.path.name,
        "logs": lambda run: ", ".join(map(str, run.logs)),
        "begun": lambda run: run.facts.get("begun"),
        "ended": lambda run: run.facts.get("ended"),
        "device": lambda run: "CPU" if run.setting("cpu") else run.facts.get("gpu"),
        "workers": lambda run: run.facts.get("devices"),
        "precision": _precision,
    }
    cells = [[name, *(value(run) or NONE for run in runs)] for name, value in rows.items()]
    own = [["Python", platform.python_version()], ["torch", torch.__version__], *_versions()]
    own += [["machine", f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors"], ["threads of torch", torch.get_num_threads()]]
    return "\n".join([
        table(header, [row for row in cells if any(cell != NONE for cell in row[1:])], "The runs, as far as logs and checkpoints say"),
        table(["", ""], own, "Where this page was written; logs do not say which versions the runs were trained with"),
    ])


def _precision(run: Run) -> Optional[str]:
    halves = [name for name in ("bf16", "fp16", "amp") if run.setting(name)]
    return ", ".join(halves) or ("float32" if run.checkpoint else None)


def _versions() -> List[List[str]]:
    found = []
    for name in ("fairseq-fixed", "fairseq", "fairseq-earm"):
        try:
            found.append([name, metadata.version(name)])
        except metadata.PackageNotFoundError:
            pass
    return found
