"""E-ARM against cross-entropy and against its controls on a language whose distribution is known.

Trains a base model per seed, continues it in several branches, generates, measures, and says what the numbers support.
About six minutes on two cores. `--tune` instead tries each branch's learning rate on a grid.
"""
from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import List, Optional

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import language  # noqa: E402
import report  # noqa: E402
import settings  # noqa: E402
from commands import (  # noqa: E402
    CommandFailed, Runner, generate_command, measure_command, preprocess_command, train_command,
)

WORKERS = 2
# The first file that a run writes: marks a folder that a later run may clear.
LOG = "preprocess.log"
PLAIN_WAYS = ("greedy", "beam")
WAYS = (*PLAIN_WAYS, "reranked", "resampled")
# Each split has a seed of its own, so that none depends on the size of another.
SPLIT_SEEDS = {"train": 1, "valid": 2, "test": 3}


class Demo:
    """All commands of one run, their files under one folder.

    Args:
        output: the folder; data, runs, logs and results go there.
        size: how much of everything.
    """

    def __init__(self, output: Path, size: settings.Size, commands: int):
        self.output, self.size = output, size
        self.raw, self.binary = output / "data" / "raw", output / "data" / "binary"
        self.runner = Runner(commands)

    def prepare(self) -> None:
        """Clear what an earlier run left, which fairseq would otherwise resume; write the sentence pairs and binarise them."""
        for name in ("data", "runs"):
            shutil.rmtree(self.output / name, ignore_errors=True)
        self.raw.mkdir(parents=True, exist_ok=True)
        for split, seed in SPLIT_SEEDS.items():
            pairs = language.sample_pairs(getattr(self.size, split), seed)
            for side, name in enumerate(("src", "tgt")):
                text = "".join(" ".join(pair[side]) + "\n" for pair in pairs)
                (self.raw / f"{split}.{name}").write_text(text)
        self.runner.run(preprocess_command(self.raw, self.binary), self.output / LOG)

    def folder(self, seed: int, name: str) -> Path:
        """Where a model's checkpoint, logs and numbers are."""
        folder = self.output / "runs" / f"seed{seed}" / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def train_base(self, seed: int) -> None:
        folder = self.folder(seed, "base")
        flags = settings.base_flags(self.size, seed)
        self.runner.run(train_command(self.binary, folder, flags), folder / "train.log")

    def train_branch(self, seed: int, key: str, name: str, learning_rate: float) -> None:
        folder, base = self.folder(seed, name), self.folder(seed, "base") / "checkpoint_last.pt"
        flags = settings.branch_flags(settings.BRANCHES[key], self.size, seed, str(base), learning_rate)
        self.runner.run(train_command(self.binary, folder, flags), folder / "train.log")

    def measure(self, seed: int, name: str, energy_step: str) -> dict:
        """Likelihoods and samples; what they found is in measure.json."""
        folder = self.folder(seed, name)
        found = folder / "measure.json"
        command = measure_command(self.binary, folder / "checkpoint_last.pt", found, self.size.samples, energy_step)
        self.runner.run(command, folder / "measure.log")
        return json.loads(found.read_text())

    def generate(self, seed: int, name: str, energy_step: str, temperature: float, reranks: bool) -> None:
        """Greedy, beam; by energy, at the temperature fitted on validation data: beam reranked and samples resampled."""
        folder = self.folder(seed, name)
        energy = ["--energy-rerank", "--energy-weight", f"{temperature:.4f}", "--energy-step", energy_step]
        ways = {
            "greedy": ["--beam", "1"],
            "beam": ["--beam", "5"],
            "reranked": ["--beam", "5", "--nbest", "1", *energy],
            "resampled": [
                "--sampling", "--beam", str(self.size.candidates), "--nbest", str(self.size.candidates), *energy,
                "--energy-select", "resample", "--seed", str(seed),
            ],
        }
        for way in WAYS if reranks else PLAIN_WAYS:
            self.runner.run(
                generate_command(self.binary, folder / "checkpoint_last.pt", ways[way]), folder / f"generate-{way}.log"
            )

    def judge(self, seed: int, name: str, energy_step: str, reranks: bool) -> None:
        """Everything that is done with a trained model."""
        found = self.measure(seed, name, energy_step)
        self.generate(seed, name, energy_step, found["temperature"], reranks)


def run_all(demo: Demo) -> None:
    """Base models first, then each seed's branches as soon as its base is there, WORKERS at a time."""

    def base(seed):
        demo.train_base(seed)
        jobs.extend(pool.submit(branch, seed, key) for key in demo.size.branches)
        demo.judge(seed, "base", "last", False)

    def branch(seed, key):
        chosen = settings.BRANCHES[key]
        demo.train_branch(seed, key, key, chosen.learning_rate)
        demo.judge(seed, key, chosen.energy_step, chosen.reranks)

    with ThreadPoolExecutor(WORKERS) as pool:
        jobs = [pool.submit(base, seed) for seed in demo.size.seeds]
        finish(demo, jobs)


def run_grid(demo: Demo) -> List[dict]:
    """Train every tuned branch of the first seed at every learning rate of the grid."""
    seed, rows = demo.size.seeds[0], []
    demo.train_base(seed)

    def trial(key, rate):
        name = f"{key}-{rate:g}"
        demo.train_branch(seed, key, name, rate)
        found = demo.measure(seed, name, settings.BRANCHES[key].energy_step)
        rows.append({"branch": key, "learning_rate": rate, **found})

    with ThreadPoolExecutor(WORKERS) as pool:
        jobs = [pool.submit(trial, key, rate) for key in settings.TUNED_BRANCHES for rate in settings.GRID]
        finish(demo, jobs)
    return sorted(rows, key=lambda row: (settings.TUNED_BRANCHES.index(row["branch"]), row["learning_rate"]))


def finish(demo: Demo, jobs: list) -> None:
    """Wait for all jobs, those included that jobs add; on the first failure stop the rest and raise it."""
    while not all(job.done() for job in jobs):
        done, _ = wait(list(jobs), return_when=FIRST_EXCEPTION)
        if any(job.exception() for job in done):
            break
    failed: Optional[BaseException] = next((job.exception() for job in jobs if job.done() and job.exception()), None)
    if failed:
        demo.runner.stop()
        raise failed


def count_commands(size: settings.Size, tune: bool) -> int:
    """How many commands a run has."""
    if tune:
        return 2 + 2 * len(settings.TUNED_BRANCHES) * len(settings.GRID)
    reranking = [settings.BRANCHES[key].reranks for key in size.branches]
    of_each = [2 + len(WAYS if reranks else PLAIN_WAYS) for reranks in [False, *reranking]]
    return 1 + sum(of_each) * len(size.seeds)


def main(arguments: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for everything that is written")
    parser.add_argument("--quick", action="store_true", help="a few updates and sentences: checks that all parts work")
    also = "also run E-ARM without variance reduction, and on the last step alone"
    parser.add_argument("--all", action="store_true", help=also)
    parser.add_argument("--tune", action="store_true", help="try learning rates on a grid instead, and print the table")
    args = parser.parse_args(arguments)
    size = settings.QUICK if args.quick else settings.FULL
    started = time.perf_counter()
    if args.all:
        size = size._replace(branches=tuple(settings.BRANCHES))
    if args.output.exists() and any(args.output.iterdir()) and not (args.output / LOG).exists():
        parser.error(f"{args.output} holds files that are no demonstration's; name another folder with --output")
    demo = Demo(args.output, size, count_commands(size, args.tune))
    try:
        demo.prepare()
        if args.tune:
            rows = run_grid(demo)
        else:
            run_all(demo)
        demo.runner.stop()
    except CommandFailed as failure:
        demo.runner.stop()
        print(failure, file=sys.stderr)
        return 1
    if args.tune:
        print(report.grid_table(rows))
    else:
        report.write(args.output, size, time.perf_counter() - started)
    return 0


if __name__ == "__main__":
    sys.exit(main())
