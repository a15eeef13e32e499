"""fairseq-earm-report: one page about one or several training runs, from what they left in and beside their --save-dir.

Found there: checkpoint_last.pt (or the best, or the newest), logs (FOLDER/*.log, FOLDER.log, or folders of --tensorboard-logdir), the --json of this
package's commands, outputs of fairseq-generate and PNG images.
"""
from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Dict, List, Optional, Sequence

from fairseq_earm.cli.common import check_json, drawing, interruptible, write_text
from fairseq_earm.errors import UsageError
from fairseq_earm.evaluation.run_folder import Run, read_run_folder


@interruptible()
def main(argv: Optional[Sequence[str]] = None) -> None:
    """The console script; says what went onto the page."""
    args = _parser().parse_args(argv)
    pages = drawing("report_page", "fairseq-earm-report draws curves")
    names = _names(args)
    logs = _logs(args, names)
    if len(names) > len(pages.RUN_COLOURS):
        raise UsageError(f"{len(names)} runs: more than {len(pages.RUN_COLOURS)} cannot be told apart in a panel; write several reports")
    check_json(args.output, flag="--output")
    runs = [read_run_folder(folder, name, logs.get(name, ())) for folder, name in zip(args.save_dir, names)]
    write_text(args.output, _page(pages, args, runs))
    for run in runs:
        print(_found(run))
    print(f"Page: {args.output}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fairseq-earm-report", description=__doc__)
    parser.add_argument("save_dir", nargs="+", metavar="SAVE_DIR", help="--save-dir of a run")
    parser.add_argument("--output", default="report.html", metavar="FILE", help="where the page goes (default: %(default)s)")
    parser.add_argument("--name", nargs="+", metavar="NAME", help="what to call the runs, in their order; by default as their folders")
    parser.add_argument(
        "--log", nargs="+", action="append", default=[], metavar=("NAME", "FILE"),
        help="a run's name and where its logs are, if not in the usual places, in the order they were written",
    )
    parser.add_argument("--title", default="Training report", help="heading of the page (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=5, metavar="N", help="sentences shown of each set (default: %(default)s)")
    return parser


def _names(args: argparse.Namespace) -> List[str]:
    """What the runs are called."""
    if args.samples < 0:
        raise UsageError(f"--samples {args.samples}: give 0 or more")
    if args.name is None:
        return distinct_names(args.save_dir)
    if len(args.name) != len(args.save_dir):
        raise UsageError(f"--name has {len(args.name)} names for {len(args.save_dir)} runs: give one for each, in their order")
    twice = [name for name in args.name if args.name.count(name) > 1]
    if twice:
        raise UsageError(f"--name {twice[0]} is given twice: give each run its own")
    return args.name


def distinct_names(folders: Sequence[str]) -> List[str]:
    """The end of each path, as much of it as tells them apart.

    Raises:
        UsageError: a folder is given twice.
    """
    parts = [Path(os.path.abspath(folder)).parts for folder in folders]
    for folder, path in zip(folders, parts):
        if parts.count(path) > 1:
            raise UsageError(f"{folder} is given twice: give each run once")
    length = 1
    while len({path[-length:] for path in parts}) < len(parts):
        length += 1
    return ["/".join(path[-length:]) for path in parts]


def _logs(args: argparse.Namespace, names: Sequence[str]) -> Dict[str, List[str]]:
    found = {}
    for name, *paths in args.log:
        if name not in names:
            raise UsageError(f"--log {name}: no run has this name; the runs are {', '.join(names)}")
        if not paths:
            raise UsageError(f"--log {name}: give its logs after the name")
        found.setdefault(name, []).extend(paths)
    return found


def _page(pages, args: argparse.Namespace, runs: Sequence[Run]) -> str:
    from fairseq_earm.cli.result_tables import result_tables
    from fairseq_earm.evaluation.samples_of_runs import samples_of_runs

    read = [(str(path), result_tables(report)) for run in runs for path, report in run.results]
    samples, notes = samples_of_runs(runs, args.samples)
    return pages.report_page(
        runs, title=args.title, results=[(path, tables) for path, tables in read if tables],
        unknown=[path for path, tables in read if not tables], samples=samples, notes=notes,
    )


def _found(run: Run) -> str:
    """One line about what was found of a run."""
    records = sum(map(len, run.history.values()))
    parts = [
        run.checkpoint.path.name if run.checkpoint else "no checkpoint",
        f"{records} records in {', '.join(map(str, run.logs))}" if run.logs else f"no log (name it with --log {run.name} FILE)",
        f"{len(run.results)} JSON, {len(run.generated)} generated, {len(run.pictures)} PNG",
    ]
    return f"{run.name}: {', '.join(parts)}"


if __name__ == "__main__":
    main()
