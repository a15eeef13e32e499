"""Gated PixelCNN on MNIST: a base by cross-entropy, then cross-entropy, the control and E-ARM from it; measure, print the table.

    experiment.py run DATA OUTPUT [--levels 2] [--seeds 1 2] [--jobs 2]
    experiment.py table OUTPUT

All of it stock commands on one thread each, printed so that they can be copied. What is finished is not done again, so a
run that was stopped goes on where it was.
"""
from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence

ROOT = Path(__file__).resolve().parents[3]
PLUGIN = ROOT / "fairseq_earm"
sys.path[:0] = [str(ROOT / "examples"), str(ROOT)]

from steps import Step, experiment_parser, run_experiment, spread  # noqa: E402

from fairseq_earm.evaluation.training_log import read_log  # noqa: E402

TASK = ["--task", "earm_image_modeling", "--valid-images", "1000"]
TRAINING = [
    "--arch", "gated_pixel_cnn_tiny", "--optimizer", "adam", "--adam-betas", "(0.9, 0.98)", "--clip-norm", "1", "--cpu",
    "--log-interval", "20", "--log-format", "json", "--no-progress-bar", "--no-epoch-checkpoints", "--num-workers", "0",
    "--disable-validation",
]
BASE = ["--criterion", "cross_entropy", "--lr", "3e-3", "--warmup-updates", "100", "--lr-scheduler", "inverse_sqrt",
        "--batch-size", "16", "--max-update", "2400"]
BRANCH = ["--batch-size", "64", "--max-update", "100"]
EARM = ["--criterion", "earm_cross_entropy", "--earm-start-update", "0"]
BRANCHES = {
    "cross-entropy": ["--criterion", "cross_entropy"],
    "control": [*EARM, "--earm-control"],
    "earm": EARM,
}
# Each branch runs with all of them, and the table takes what the validation set likes best.
LEARNING_RATES = ("1e-3", "3e-4")
NAMES = {"base": "base", "cross-entropy": "cross-entropy", "control": "control", "earm": "E-ARM"}


class Experiment:
    """The commands of one run.

    Args:
        data: folder with MNIST's idx files.
        output: folder of the checkpoints, logs, pictures and results.
        levels: of a value.
    """

    def __init__(self, data: Path, output: Path, levels: int = 256):
        self.data, self.output = data, output
        self.task = [*TASK, "--image-levels", str(levels)]

    def steps(self, seeds: Sequence[int]) -> List[Step]:
        """For each seed a base, and from it every branch with every learning rate; all of them measured."""
        steps = []
        for seed in seeds:
            base = f"base-{seed}"
            steps.append(self._train(base, BASE, seed))
            for branch, flags in BRANCHES.items():
                for rate in LEARNING_RATES:
                    start = ["--finetune-from-model", str(self._checkpoint(base))]
                    steps.append(self._train(f"{branch}-{rate}-{seed}", [*BRANCH, *flags, "--lr", rate, *start], seed, (base,)))
        steps += [self._measure(step.name) for step in steps]
        last = LEARNING_RATES[0]
        return [*steps, *[self._picture(f"{branch}-{last}-{seeds[0]}") for branch in BRANCHES]]

    def _checkpoint(self, name: str) -> Path:
        return self.output / name / "checkpoint_last.pt"

    def _train(self, name: str, flags: List[str], seed: int, needs: Sequence[str] = ()) -> Step:
        save = [f"--save-dir={self._checkpoint(name).parent}", "--seed", str(seed)]
        return Step(name, ["fairseq-train", str(self.data), f"--user-dir={PLUGIN}", *self.task, *TRAINING, *flags, *save], tuple(needs))

    def _measure(self, name: str) -> Step:
        """On the validation images and all test images."""
        words = ["fairseq-validate", str(self.data), f"--user-dir={PLUGIN}", *self.task, "--path", str(self._checkpoint(name))]
        words += ["--valid-subset", "valid,test", "--batch-size", "50", "--cpu", "--num-workers", "0", "--log-format", "json"]
        return Step(f"{name}.measure", words, (name,))

    def _picture(self, name: str) -> Step:
        picture = str(self.output / f"{name}.png")
        words = ["fairseq-earm-sample", "--path", str(self._checkpoint(name)), "--output", picture, "--samples", "64", "--cpu"]
        return Step(f"{name}.picture", words, (name,))


class Result(NamedTuple):
    """Of one model: bits per dimension on both sets, E-ARM's bound on the training data, where it has one."""

    valid: float
    test: float
    dv: Optional[float]


def read_results(output: Path, branch: str) -> Dict[str, List[Result]]:
    """By learning rate (empty for the base) the results of the seeds that were measured."""
    found: Dict[str, List[Result]] = {}
    for path in sorted(output.glob(f"{branch}-*.measure.log")):
        name = path.name[: -len(".measure.log")]
        rate = name[len(branch) + 1 :].rpartition("-")[0]
        bits = {split: read_log(path)[split][-1]["bits_per_dim"] for split in ("valid", "test")}
        trained = read_log(output / f"{name}.log").get("train", [{}])
        found.setdefault(rate, []).append(Result(bits["valid"], bits["test"], trained[-1].get("earm_dv")))
    return found


def print_table(output: Path) -> None:
    """One row per branch at its best learning rate, mean and spread over the seeds that were run."""
    print("| | learning rate | seeds | valid, bits per dimension | test, bits per dimension | DV bound, nats per value |")
    print("|---|---|---|---|---|---|")
    for branch, title in NAMES.items():
        rates = read_results(output, branch)
        if not rates:
            continue
        best = min(rates, key=lambda rate: statistics.mean(result.valid for result in rates[rate]))
        results = rates[best]
        bounds = [result.dv for result in results if result.dv is not None]
        columns = [spread([result.valid for result in results], 4), spread([result.test for result in results], 4), spread(bounds, 4)]
        print(f"| {title} | {best} | {len(results)} | {' | '.join(columns)} |")


def main() -> None:
    parser, run = experiment_parser(__doc__)
    run.add_argument("--levels", type=int, default=256, help="of a value; 2 makes the images black and white")
    args = parser.parse_args()
    run_experiment(args, lambda: Experiment(args.data, args.output, args.levels).steps(args.seeds), print_table)


if __name__ == "__main__":
    main()
