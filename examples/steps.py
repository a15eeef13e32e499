"""Long experiments as steps: each a command with a log of its own, done once, after the steps that it needs."""
from __future__ import annotations

import argparse
import os
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Callable, List, NamedTuple, Sequence, Tuple


class Step(NamedTuple):
    """One command of an experiment.

    Attributes:
        name: its log is NAME.log; slashes make folders.
        words: the command.
        needs: names of the steps whose results it reads.
    """

    name: str
    words: List[str]
    needs: Tuple[str, ...] = ()


def run_steps(steps: Sequence[Step], logs: Path, jobs: int) -> None:
    """Run what is not done yet, `jobs` at a time: the first of the steps whose needs are met.

    Raises:
        SystemExit: a command failed; those that do not need it were still run.
        ValueError: a step needs one that is not there.
    """
    waiting, running, finished, failures = list(steps), {}, set(), []
    with ThreadPoolExecutor(jobs) as pool:
        while True:
            for step in [step for step in waiting if finished.issuperset(step.needs)][: jobs - len(running)]:
                waiting.remove(step)
                running[pool.submit(_run_step, step, logs)] = step.name
            if not running:
                break
            for job in wait(running, return_when=FIRST_COMPLETED).done:
                name, failure = running.pop(job), job.exception()
                failures += [failure] if failure else []
                finished |= set() if failure else {name}
    if failures:
        raise failures[0]
    if waiting:
        raise ValueError(f"{waiting[0].name} needs {', '.join(waiting[0].needs)}: there are no such steps")


def _run_step(step: Step, logs: Path) -> None:
    log = logs / f"{step.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    if not done(log):
        command(step.words, log)


def done(log: Path) -> bool:
    """Whether the command behind a log has succeeded."""
    return log.exists() and log.read_text(errors="replace").endswith("finished\n")


def command(words: list, log: Path) -> None:
    """Run a stock command on one thread; its log ends with "finished" only if it succeeded."""
    print("$ " + shlex.join(words), flush=True)
    with log.open("w") as file:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path}
        status = subprocess.run(words, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
        if status != 0:
            raise SystemExit(f"{words[0]} failed with status {status}; see {log}")
        file.write("finished\n")


def experiment_parser(description: str) -> Tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """The command line of an experiment, `run DATA OUTPUT` or `table OUTPUT`, and the part of it behind `run`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    run = commands.add_parser("run")
    run.add_argument("data", type=Path)
    run.add_argument("output", type=Path)
    run.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    run.add_argument("--jobs", type=int, default=2, help="commands at a time, one thread each")
    commands.add_parser("table").add_argument("output", type=Path)
    return parser, run


def run_experiment(args: argparse.Namespace, steps: Callable[[], List[Step]], print_table: Callable[[Path], None]) -> None:
    """Do what the command line asks for: under `run` the steps, and the table in any case."""
    if args.command == "run":
        run_steps(steps(), args.output, args.jobs)
    print_table(args.output)


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± sample standard deviation; of one value the value, of none nothing."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"
