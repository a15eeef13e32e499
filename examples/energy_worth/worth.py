"""What the energy of E-ARM is worth: branches from one base, each with its rate chosen on two seeds and judged on five
others.

    worth.py tune CORPUS OUTPUT       every branch at every rate of the grid, seeds 1 and 2
    worth.py confirm CORPUS OUTPUT    every branch at its best rate by validation data, five fresh seeds

CORPUS is a name in worth_plan.py. The synthetic language is made on the spot; for multi30k give --data and --base. Each
finished branch leaves one file in results/CORPUS, and is not run again; so a run that was stopped goes on where it was.
OUTPUT holds data, checkpoints and logs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Dict, List, Optional, Sequence

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "synthetic"), str(HERE.parents[1])]

import language  # noqa: E402
from commands import CommandFailed, Runner, generate_command, preprocess_command, train_command  # noqa: E402
from worth_plan import BRANCHES, CORPORA, Corpus  # noqa: E402
from worth_verdict import best_rates, finished  # noqa: E402

SPLIT_SEEDS = {"train": 1, "valid": 2, "test": 3}
HELD_OUT = 400
WARMUP = 20
# glibc then keeps freed memory, which halves the time of an update on a CPU.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**32)}


class Experiment:
    """The runs of one corpus.

    Args:
        name: of the corpus.
        output: folder of data, checkpoints and logs.
        results: folder of finished branches.
        data, base: binary data and the checkpoint that branches start from, where they are given.
    """

    def __init__(self, name: str, output: Path, results: Path, data: Optional[Path], base: Optional[Path]):
        self.corpus: Corpus = CORPORA[name]
        self.output, self.results, self.data, self.base = output / name, results / name, data, base
        self.results.mkdir(parents=True, exist_ok=True)
        self.output.mkdir(parents=True, exist_ok=True)

    def prepare(self, runner: Runner) -> None:
        """Write and binarise the sentence pairs, the same ones for every seed."""
        finished = self.output / "preprocessed"
        if self.corpus.pairs == 0 or finished.exists():
            return
        raw = self.output / "raw"
        raw.mkdir(exist_ok=True)
        for split, seed in SPLIT_SEEDS.items():
            pairs = language.sample_pairs(self.corpus.pairs if split == "train" else HELD_OUT, seed)
            for side, suffix in enumerate(("src", "tgt")):
                (raw / f"{split}.{suffix}").write_text("".join(" ".join(pair[side]) + "\n" for pair in pairs))
        runner.run(preprocess_command(raw, self.output / "binary"), self.output / "preprocess.log")
        finished.touch()

    def binary(self) -> Path:
        return self.data or self.output / "binary"

    def train_base(self, runner: Runner, seed: int) -> Path:
        """The checkpoint that the seed's branches start from, trained unless it is there."""
        if self.base is not None:
            return self.base
        folder = self.output / f"seed{seed}" / "base"
        if not (folder / "finished").exists():
            folder.mkdir(parents=True, exist_ok=True)
            flags = [*self.corpus.flags, *self.corpus.base_flags, "--seed", str(seed)]
            runner.run(train_command(self.binary(), folder, flags), folder / "train.log")
            (folder / "finished").touch()
        return folder / "checkpoint_last.pt"

    def result(self, branch: str, rate: float, seed: int) -> Path:
        name = branch.replace(", ", "_").replace(" ", "-")
        return self.results / f"{name}_lr{rate:g}_updates{self.updates(branch)}_seed{seed}.json"

    def translates(self, seed: int) -> bool:
        """Whether the test set is translated: only by what the verdict rests on."""
        return bool(self.corpus.generate) and seed in self.corpus.fresh_seeds

    def updates(self, branch: str) -> int:
        return round(self.corpus.updates * BRANCHES[branch].updates)

    def run_branch(self, runner: Runner, base: Path, seed: int, branch: str, rate: float) -> None:
        """Train, measure and, if wanted, translate; one file says what came out."""
        target, updates = self.result(branch, rate, seed), str(self.updates(branch))
        folder = self.output / f"seed{seed}" / target.stem
        folder.mkdir(parents=True, exist_ok=True)
        for left_over in folder.glob("checkpoint*.pt"):
            left_over.unlink()  # of a run that was stopped, which would go on without its optimizer's state
        flags = [
            *self.corpus.flags,
            *BRANCHES[branch].flags,
            "--seed",
            str(seed),
            "--lr",
            str(rate),
            "--lr-scheduler",
            "polynomial_decay",
            "--warmup-updates",
            str(WARMUP),
            "--total-num-update",
            updates,
            "--max-update",
            updates,
            f"--finetune-from-model={base}",
        ]
        train = train_command(self.binary(), folder, flags)
        if BRANCHES[branch].script:
            train[:1] = ["python", str(HERE / BRANCHES[branch].script)]
        runner.run(train, folder / "train.log")
        found = folder / "measure.json"
        runner.run(self.measure_command(folder, found, branch), folder / "measure.log")
        numbers = json.loads(found.read_text())
        if self.translates(seed):
            runner.run(
                generate_command(self.binary(), folder / "checkpoint_last.pt", self.corpus.generate),
                folder / "generate.log",
            )
            numbers["bleu"] = bleu(folder / "generate.log")
        numbers.update(
            training_figures(folder / "train.log"), branch=branch, rate=rate, seed=seed, updates=int(updates)
        )
        numbers["flags"] = BRANCHES[branch].flags
        if seed in self.corpus.fresh_seeds:
            of_sentences = json.loads(found.with_suffix(".sentences.json").read_text())
            numbers["sentences"] = {key: [round(each, 3) for each in values] for key, values in of_sentences.items()}
        target.write_text(_one_line_a_key(numbers))
        (folder / "checkpoint_last.pt").unlink()
        (folder / "checkpoint_best.pt").unlink(missing_ok=True)

    def measure_command(self, folder: Path, found: Path, branch: str) -> List[str]:
        a, b = self.corpus.max_len
        return [
            "python",
            str(HERE / "measure_branch.py"),
            str(self.binary()),
            str(folder / "checkpoint_last.pt"),
            str(found),
            "--samples",
            str(self.corpus.samples),
            "--energy-step",
            BRANCHES[branch].energy_step,
            "--max-len",
            str(a),
            str(b),
            *(["--synthetic"] if self.corpus.pairs else []),
        ]


def bleu(log: Path) -> float:
    """The score at the end of a log of fairseq-generate."""
    import re

    return float(re.findall(r"BLEU4? = ([\d.]+)", log.read_text())[-1])


def training_figures(log: Path) -> dict:
    """Seconds per update, and the mean DV and gradient norm of the second half of a training."""
    from fairseq_earm.evaluation.training_log import read_log

    inner = read_log(log).get("train_inner", [])
    half = inner[len(inner) // 2 :]

    def mean(key):
        values = [record[key] for record in half if record.get(key) is not None]
        return statistics.mean(values) if values else None

    rates = [1 / record["ups"] for record in inner if record.get("ups")]
    return {
        "seconds_per_update": statistics.median(rates),
        "training_dv": mean("earm_dv"),
        "gradient_norm": mean("gnorm"),
    }


def _one_line_a_key(numbers: dict) -> str:
    """JSON that is read and compared line by line."""
    return "{\n" + ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in numbers.items()) + "\n}\n"


def chosen_rates(corpus: Corpus, results: Path, branches: Sequence[str]) -> Dict[str, float]:
    """The best rate of each branch.

    Raises:
        SystemExit: a branch was not tuned.
    """
    best = best_rates(corpus, finished(results))
    missing = [name for name in branches if name not in best]
    if missing:
        raise SystemExit(f"{results.name}: {', '.join(missing)} not tuned yet; run worth.py tune first")
    return {name: best[name][1] for name in branches}


def run(args) -> None:
    """All branches of the seeds that are wanted, `--jobs` at a time."""
    os.environ.update(MALLOC)
    experiment = Experiment(args.corpus, args.output, args.results, args.data, args.base)
    corpus = experiment.corpus
    branches = args.branches or corpus.branches
    if args.command == "tune":
        seeds, rates = args.seeds or corpus.tuning_seeds, {branch: args.rates or corpus.rates for branch in branches}
    else:
        chosen = (
            dict.fromkeys(branches, args.rates[0]) if args.rates else chosen_rates(corpus, experiment.results, branches)
        )
        seeds, rates = args.seeds or corpus.fresh_seeds, {branch: [chosen[branch]] for branch in branches}
    wanted = [(branch, rate) for branch in branches for rate in rates[branch]]
    runner = Runner(sum(3 if experiment.translates(seed) else 2 for seed in seeds) * len(wanted))
    try:
        experiment.prepare(runner)
        with ThreadPoolExecutor(args.jobs) as pool:
            bases = dict(zip(seeds, pool.map(lambda seed: experiment.train_base(runner, seed), seeds)))
            missing = [
                (seed, *each) for seed in seeds for each in wanted if not experiment.result(*each, seed).exists()
            ]
            jobs = [pool.submit(experiment.run_branch, runner, bases[seed], seed, *each) for seed, *each in missing]
            for job in jobs:
                job.result()
    except CommandFailed as failure:
        runner.stop()
        raise SystemExit(str(failure)) from None
    runner.stop()


def main(arguments: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    for name in ("tune", "confirm"):
        one = commands.add_parser(name)
        one.add_argument("corpus", choices=list(CORPORA))
        one.add_argument("output", type=Path)
        one.add_argument("--data", type=Path, help="binary data, where the corpus is not made on the spot")
        one.add_argument(
            "--base", type=Path, help="checkpoint that all branches start from, where none is trained for each seed"
        )
        one.add_argument("--branches", nargs="+", choices=list(BRANCHES), help="default: all of the corpus")
        one.add_argument("--rates", nargs="+", type=float, help="default: the grid of the corpus, or the best of it")
        one.add_argument("--seeds", nargs="+", type=int, help="default: those of the corpus")
        one.add_argument("--jobs", type=int, default=2, help="commands at a time, one thread each")
        one.add_argument("--results", type=Path, default=HERE / "results")
        one.set_defaults(function=run)
    args = parser.parse_args(arguments)
    args.function(args)


if __name__ == "__main__":
    main()
