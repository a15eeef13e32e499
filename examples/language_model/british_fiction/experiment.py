"""A language model of British fiction: cross-entropy, control and E-ARM from one start, and when E-ARM should enter.

    experiment.py run DATA OUTPUT [--seeds 1 2] [--jobs 2] [--quick]
    experiment.py table OUTPUT

All of it stock commands on one thread each, printed so that they can be copied. What is finished is not done again, so a
run that was stopped goes on where it was.
"""
from __future__ import annotations

import json
import re
import statistics
import sys
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence

ROOT = Path(__file__).resolve().parents[3]
PLUGIN = ROOT / "fairseq_earm"
sys.path.insert(0, str(ROOT / "examples"))

from steps import Step, done, experiment_parser, run_experiment, spread  # noqa: E402

PREFIX, LENGTH = 14, 64  # a negative's 50 tokens are the rest of the block
TASK = [
    "--task", "earm_language_modeling", "--earm-prefix-length", str(PREFIX), "--earm-negative-length", str(LENGTH - PREFIX),
    "--tokens-per-sample", str(LENGTH), "--sample-break-mode", "none",
]
TRAINING = [
    "--arch", "transformer_lm_residual_tiny", "--dropout", "0.1", "--max-tokens", "2048", "--optimizer", "adam", "--adam-betas",
    "(0.9, 0.98)", "--clip-norm", "1", "--no-epoch-checkpoints", "--cpu", "--num-workers", "1", "--no-progress-bar",
    "--log-format", "json", "--log-interval", "5",
]
CROSS_ENTROPY = ["--criterion", "cross_entropy"]
EARM = ["--criterion", "earm_cross_entropy", "--earm-weight", "0.05", "--earm-recent-tokens", "2", "--earm-energy-steps", "all"]
LAST_STEP = ["--criterion", "earm_cross_entropy", "--earm-weight", "1", "--earm-recent-tokens", "0", "--earm-energy-steps", "last"]
# Each branch's criterion and learning rate.
BRANCHES = {
    "cross-entropy": (CROSS_ENTROPY, 1e-3),
    "control": ([*EARM, "--earm-start-update", "0", "--earm-control"], 1e-3),
    "control-2e-3": ([*EARM, "--earm-start-update", "0", "--earm-control"], 2e-3),
    "earm": ([*EARM, "--earm-start-update", "0"], 1e-3),
    "control-last": ([*LAST_STEP, "--earm-start-update", "0", "--earm-control"], 1e-3),
    "earm-last": ([*LAST_STEP, "--earm-start-update", "0"], 1e-3),
}
STAGES = 4  # of the sweep
NAMES = {
    "start": "the start of all branches",
    "cross-entropy": "cross-entropy",
    "control": "control, learning rate 1e-3",
    "control-2e-3": "control, learning rate 2e-3",
    "earm": "E-ARM, the paper's setting",
    "control-last": "control of the last step alone",
    "earm-last": "E-ARM, λ = 1 on the last step alone",
    **{f"sweep-{stage}": f"E-ARM from stage {stage} of {STAGES} on" for stage in range(1, STAGES + 1)},
    "sweep-never": "cross-entropy all the time",
}


class Size(NamedTuple):
    """Updates of the start, of a branch and of a model of the sweep; test sequences, and samples for each one's log Z."""

    start: int = 600
    branch: int = 200
    sweep: int = 400
    sequences: int = 40
    samples: int = 128


QUICK = Size(start=6, branch=4, sweep=8, sequences=2, samples=4)


class Experiment:
    """The commands of one run.

    Args:
        data: what prepare.sh wrote as bin/.
        output: folder of the checkpoints, logs and results.
    """

    def __init__(self, data: Path, output: Path, size: Size = Size()):
        self.data, self.output, self.size = data, output, size

    def steps(self, seeds: List[int]) -> List[Step]:
        """The start, each seed's branches from it, the sweep with the first seed; each is measured as soon as it is trained."""
        schedule = ["--lr", "0.002", "--lr-scheduler", "fixed", "--warmup-updates", "100", "--max-update", str(self.size.start)]
        steps = self._model("start", [*CROSS_ENTROPY, *schedule], seeds[0])
        for seed in seeds:
            for name, (criterion, lr) in BRANCHES.items():
                start = [f"--finetune-from-model={self._checkpoint('start')}"]
                flags = [*criterion, *_to_zero(lr, self.size.branch, warmup=20), *start]
                steps += self._model(f"{name}-seed{seed}", flags, seed, needs=("start",))
        for stage in (*range(1, STAGES + 1), "never"):
            steps += self._model(f"sweep-{stage}", [*self._enters(stage), *_to_zero(2e-3, self.size.sweep, warmup=50)], seeds[0])
        return steps

    def _enters(self, stage) -> List[str]:
        if stage == "never":
            return CROSS_ENTROPY
        return [*EARM, "--earm-start-update", str((stage - 1) * self.size.sweep // STAGES)]

    def _checkpoint(self, name: str) -> Path:
        return self.output / name / "checkpoint_last.pt"

    def _model(self, name: str, flags: Sequence[str], seed: int, needs: Sequence[str] = ()) -> List[Step]:
        """Training, perplexity on the test set, joint perplexity on some of it."""
        plugin, path = f"--user-dir={PLUGIN}", ["--path", str(self._checkpoint(name))]
        save = [f"--save-dir={self._checkpoint(name).parent}", "--seed", str(seed)]
        train = ["fairseq-train", str(self.data), plugin, *TASK, *TRAINING, *flags, *save]
        test = ["fairseq-eval-lm", str(self.data), plugin, *TASK, *path, "--gen-subset", "test", "--max-tokens", "4096", "--cpu"]
        test += ["--num-workers", "1", "--no-progress-bar"]
        joint = ["fairseq-earm-perplexity", str(self.data), *path, "--energy", "earm", "--cpu", "--prefix-length", str(PREFIX)]
        joint += ["--sequence-length", str(LENGTH), "--max-sequences", str(self.size.sequences)]
        joint += ["--samples", str(self.size.samples), "--json", str(self.output / f"{name}.json")]
        return [Step(name, train, tuple(needs)), Step(f"{name}.test", test, (name,)), Step(f"{name}.joint", joint, (name,))]


def _to_zero(lr: float, updates: int, warmup: int) -> List[str]:
    schedule = ["--lr-scheduler", "polynomial_decay", "--total-num-update", str(updates), "--max-update", str(updates)]
    return ["--lr", f"{lr:g}", *schedule, "--warmup-updates", str(min(warmup, updates // 4))]


class Figures(NamedTuple):
    """What is known of one trained model; DV bounds in nats, of test sequences at the last token and of batches in training."""

    valid: float
    test: float
    base: float
    lower: float
    upper: float
    dv: float
    dv_error: Optional[float]
    training_dv: Optional[float]
    seconds: float


def figures(output: Path, name: str) -> Optional[Figures]:
    """None while the model is not measured."""
    log, test = output / f"{name}.log", output / f"{name}.test.log"
    if not (done(test) and (output / f"{name}.json").exists()):
        return None
    report = json.loads((output / f"{name}.json").read_text())
    [row], length = report["joint"], LENGTH - PREFIX
    error = row["gain_standard_error"]
    return Figures(
        float(_entries(log, "valid")[-1]["valid_ppl"]), float(re.search(r"Perplexity: ([\d.]+)", test.read_text()).group(1)),
        report["base"]["perplexity"], row["perplexity_lower"], row["perplexity_upper"], row["gain"] * length,
        None if error is None else error * length, *_training(log),
    )


def _training(log: Path) -> tuple:
    """(mean DV over the last quarter of what was logged with E-ARM, seconds of an update)."""
    dv = [float(entry["earm_dv"]) for entry in _entries(log, "train_inner") if "earm_dv" in entry]
    last, whole = dv[-max(1, len(dv) // 4) :], _entries(log, "train")[-1]
    return statistics.mean(last) if last else None, float(whole["train_train_wall"]) / float(whole["train_num_updates"])


def _entries(log: Path, tag: str) -> List[dict]:
    lines = [line for line in log.read_text().splitlines() if f"| {tag} | {{" in line]
    return [json.loads(line[line.index("{") :]) for line in lines]


def print_table(output: Path) -> None:
    """Branches from one start, then the sweep; mean and spread over the seeds that were run."""
    seeds = sorted({path.stem.rpartition("-seed")[2] for path in output.glob("*-seed*.json")})
    found: Dict[str, List[Figures]] = {}
    for name in NAMES:
        runs = [name] if name == "start" or name.startswith("sweep") else [f"{name}-seed{seed}" for seed in seeds]
        found[name] = [row for row in (figures(output, run) for run in runs) if row]
    _print_rows("model", [name for name in NAMES if not name.startswith("sweep")], found)
    print()
    _print_rows("the same updates from the beginning", [name for name in NAMES if name.startswith("sweep")], found)


def _print_rows(title: str, names: List[str], found: Dict[str, List[Figures]]) -> None:
    print(
        f"| {title} | seeds | valid | test | test, given {PREFIX} tokens | with its energy, lower to upper | DV, test | DV, training | "
        "s per update |\n|---|---|---|---|---|---|---|---|---|"
    )
    for name in names:
        rows = found[name]
        if not rows:
            continue
        cells = [spread([getattr(row, key) for row in rows], 2) for key in ("valid", "test", "base")]
        bounds = " to ".join(spread([getattr(row, key) for row in rows], 2) for key in ("lower", "upper"))
        dv = "; ".join(f"{row.dv:+.3f}" + (f" ± {row.dv_error:.3f}" if row.dv_error is not None else "") for row in rows)
        training = "; ".join(f"{row.training_dv:+.3f}" for row in rows if row.training_dv is not None)
        seconds = f"{statistics.mean(row.seconds for row in rows):.2f}"
        print("| " + " | ".join([NAMES[name], str(len(rows)), *cells, bounds, dv, training, seconds]) + " |")


def main() -> None:
    parser, run = experiment_parser(__doc__)
    run.add_argument("--quick", action="store_true", help="a few updates of everything, to see that it runs")
    args = parser.parse_args()
    run_experiment(
        args, lambda: Experiment(args.data, args.output, QUICK if args.quick else Size()).steps(args.seeds), print_table
    )


if __name__ == "__main__":
    main()
