"""fairseq-earm-analyse convergence: cross-entropy on training and test data by epoch, of several runs (the paper's Figure 2)."""
from __future__ import annotations

import argparse
import os
from typing import Dict, List

from fairseq_earm.cli.common import check_json, check_png, drawing, write_json, writing
from fairseq_earm.errors import UsageError
from fairseq_earm.evaluation.training_log import find_logs, is_residual, read_run


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this command."""
    parser.add_argument(
        "--run", nargs="+", action="append", required=True, metavar="NAME", dest="runs",
        help="NAME LOG [LOG ...]: what to call a setting, then one log for each of its seeds. A log is what fairseq-train printed "
        "or wrote to --log-file, the folder of --tensorboard-logdir, or the run's --save-dir if its logs are in it or beside it",
    )
    parser.add_argument("--output", required=True, metavar="FILE.png", help="where the figure goes")
    parser.add_argument(
        "--by", choices=["epoch", "update"], default="epoch", help="what the curves go by; updates show more of a run of few epochs",
    )
    parser.add_argument("--title", default="", help="heading of the figure")
    parser.add_argument("--json", metavar="FILE", help="also write the curves there, as numbers")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Read, draw and write; says what each curve ends at."""
    curves = drawing("curves", "fairseq-earm-analyse convergence draws")
    _check_flags(args)
    check_json(args.json)
    logs = {name: paths for name, *paths in args.runs}
    runs = {name: [curves.convergence_of(_history(name, path), args.by) for path in paths] for name, paths in logs.items()}
    for name, seeds in runs.items():
        for path, seed in zip(logs[name], seeds):
            if not seed.curves:
                raise UsageError(f"--run {name} {path}: no loss was logged by {args.by}; give another log, or --by update")
    with writing("--output", args.output):
        curves.convergence(runs, args.by, args.output, args.title)
    for name, seeds in runs.items():
        print(f"{name}: {_ends(seeds, args.by)}")
    print(f"Figure: {args.output}")
    if args.json:
        write_json(args.json, _report(args.by, logs, runs))


def _history(name: str, path: str) -> dict:
    history = read_log_or_folder(path)
    if is_residual(history):
        raise UsageError(
            f"--run {name} {path}: of an energy network, whose loss is no cross-entropy of tokens; fairseq-earm-report draws it"
        )
    return history


def read_log_or_folder(path: str) -> dict:
    """History of one run from its log, from its folder of --tensorboard-logdir, or from its --save-dir.

    Raises:
        UsageError: nothing to read there.
    """
    if not os.path.exists(path):
        raise UsageError(f"{path}: there is no such log; give what fairseq-train printed or wrote to --log-file")
    found = find_logs(path) if os.path.isdir(path) else [path]
    if not found:
        raise UsageError(f"{path} has no log of training in it, none beside it and none of TensorBoard's files: name the log itself")
    return read_run(found)


def _check_flags(args: argparse.Namespace) -> None:
    names = [name for name, *_ in args.runs]
    for name, *paths in args.runs:
        if not paths:
            raise UsageError(f"--run {name}: give a log after the name")
        if names.count(name) > 1:
            raise UsageError(f"--run {name} is given twice: put the logs of all its seeds after one --run {name}")
    check_png(args.output, flag="--output")


def _ends(seeds: list, by: str) -> str:
    """Last value of each curve, averaged over the seeds."""
    kinds = dict.fromkeys(kind for seed in seeds for kind in seed.curves)
    parts = []
    for kind in kinds:
        ends = [seed.curves[kind] for seed in seeds if kind in seed.curves]
        mean = sum(y[-1] for _, y in ends) / len(ends)
        parts.append(f"{kind} {mean:.3f} at {by} {'/'.join(sorted({f'{x[-1]:g}' for x, _ in ends}))}")
    return ", ".join(parts) + f" ({len(seeds)} seed{'s' if len(seeds) > 1 else ''})"


def _report(by: str, logs: Dict[str, List[str]], runs: dict) -> dict:
    return {
        "by": by,
        "unit": "fairseq's loss: base 2, per token",
        "runs": {
            name: [
                {"log": path, "key": seed.key, "earm_from": seed.earm,
                 "curves": {kind: {by: x, "cross_entropy": y} for kind, (x, y) in seed.curves.items()}}
                for path, seed in zip(logs[name], seeds)
            ]
            for name, seeds in runs.items()
        },
    }
