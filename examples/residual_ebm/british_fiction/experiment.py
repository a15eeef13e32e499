"""Base language model, energies on its residual, RALM and BALM on British fiction: train, measure, print the table.

    experiment.py run DATA OUTPUT [--seeds 1 2] [--jobs 2]
    experiment.py table OUTPUT

All of it stock commands on one thread each, printed so that they can be copied. What is finished is not done again, so a
run that was stopped goes on where it was.
"""
from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Dict, List, Sequence

ROOT = Path(__file__).resolve().parents[3]
PLUGIN = ROOT / "fairseq_earm"
sys.path.insert(0, str(ROOT / "examples"))

from steps import Step, experiment_parser, run_experiment, spread  # noqa: E402

PREFIX, LENGTH = 40, 64
SEQUENCES, SAMPLES = 250, 512  # of the test set, and of each sequence for log Z
TRAINING = [
    "--optimizer", "adam", "--adam-betas", "(0.9, 0.98)", "--lr-scheduler", "polynomial_decay", "--clip-norm", "1",
    "--cpu", "--log-interval", "100", "--log-format", "simple", "--no-progress-bar", "--no-epoch-checkpoints", "--num-workers", "1",
]
LANGUAGE_MODEL = [
    "--task", "language_modeling", "--criterion", "cross_entropy", "--dropout", "0.1",
    "--tokens-per-sample", str(LENGTH), "--sample-break-mode", "none", "--max-tokens", "2048", *TRAINING,
]
SIX_EPOCHS = ["--lr", "3e-3", "--warmup-updates", "200", "--total-num-update", "6792", "--max-epoch", "6"]
FIVE_EPOCHS = ["--lr", "2e-3", "--warmup-updates", "200", "--total-num-update", "5660", "--max-epoch", "5"]
THREE_EPOCHS = ["--lr", "2e-3", "--warmup-updates", "400", "--total-num-update", "3400", "--max-epoch", "3"]
BASE = [
    "--arch", "transformer_lm_residual_tiny", "--decoder-layers", "1", "--decoder-embed-dim", "64", "--decoder-ffn-embed-dim", "256",
    "--decoder-attention-heads", "2", *LANGUAGE_MODEL, *SIX_EPOCHS,
]
BALM = ["--arch", "transformer_lm_residual_tiny", *LANGUAGE_MODEL, *THREE_EPOCHS]
RALM = ["--arch", "residual_transformer_lm_tiny", *LANGUAGE_MODEL, *THREE_EPOCHS]
# With 15 % of the words masked, as usual, with dropout and without pre-norm it stays at the frequencies of words for 3,000 updates.
MASKED_LANGUAGE_MODEL = [
    "--task", "masked_lm", "--criterion", "masked_lm", "--arch", "roberta", "--encoder-layers", "2", "--encoder-embed-dim", "128",
    "--encoder-ffn-embed-dim", "512", "--encoder-attention-heads", "4", "--encoder-normalize-before", "--mask-prob", "0.4",
    "--dropout", "0", "--attention-dropout", "0", "--tokens-per-sample", str(LENGTH + 1), "--max-positions", "128",
    "--sample-break-mode", "none", "--max-tokens", "2080", *TRAINING, *FIVE_EPOCHS,
]
ENERGY = [
    "--task", "residual_language_modeling", "--criterion", "residual_nce", "--prefix-length", str(PREFIX),
    "--sequence-length", str(LENGTH), "--batch-size", "32", "--batch-size-valid", "32", "--dropout", "0.1", "--lr", "1e-3",
    "--warmup-updates", "100", "--total-num-update", "2000", "--max-update", "2000", *TRAINING,
]
BIT = ["--arch", "bit_tiny", "--max-positions", "128", "--encoder-normalize-before", "--layernorm-embedding"]
# Each energy's flags, and the model that it starts from.
ENERGIES = {"unit": (["--arch", "unit_tiny"], "balm"), "bit": (BIT, None), "bit-mlm": (BIT, "mlm")}
EVERY_SEED = ("bit-mlm", "unit")  # and the base; all other models have the first seed alone
NAMES = {
    "base": "BASE LM", "unit": "joint UNIT, started from BALM", "bit": "joint BIT, from scratch",
    "bit-mlm": "joint BIT, started from the masked LM", "ralm": "RALM", "balm": "BALM",
}


class Experiment:
    """The commands of one run.

    Args:
        data: what prepare.sh wrote as bin/.
        output: folder of the checkpoints, logs and results.
    """

    def __init__(self, data: Path, output: Path):
        self.data, self.output = data, output

    def steps(self, seeds: List[int]) -> List[Step]:
        """The models that others need, then for each seed its energies, and with the first seed all the rest."""
        first = seeds[0]
        steps = [self._train("base", BASE, seed) for seed in seeds]
        steps += [self._train("balm", BALM, first), self._train("mlm", MASKED_LANGUAGE_MODEL, first)]
        for seed in seeds:
            for name in EVERY_SEED if seed != first else ("bit-mlm", "unit", "bit"):
                steps += [self._energy(name, seed, first), self._perplexity("base", seed, name)]
        base = ["--base-lm", str(self._checkpoint("base", first))]
        steps += [self._train("ralm", [*RALM, *base], first, needs=(f"base-{first}",))]
        steps += [self._perplexity("base", seed) for seed in seeds]
        return [*steps, *[self._perplexity(name, first) for name in ("ralm", "balm")]]

    def _checkpoint(self, name: str, seed: int) -> Path:
        return self.output / f"{name}-{seed}" / "checkpoint_best.pt"

    def _train(self, name: str, flags: List[str], seed: int, needs: Sequence[str] = ()) -> Step:
        save = [f"--save-dir={self._checkpoint(name, seed).parent}", "--seed", str(seed)]
        words = ["fairseq-train", str(self.data), f"--user-dir={PLUGIN}", *flags, *save]
        return Step(f"{name}-{seed}", words, tuple(needs))

    def _energy(self, name: str, seed: int, first: int) -> Step:
        """On this seed's base, from the one language model or masked language model that there is."""
        flags, start = ENERGIES[name]
        flags = [*ENERGY, *flags, "--base-lm", str(self._checkpoint("base", seed))]
        if start:
            flags += ["--energy-init", str(self._checkpoint(start, first))]
        return self._train(name, flags, seed, [f"base-{seed}", f"{start}-{first}"] if start else [f"base-{seed}"])

    def _perplexity(self, path: str, seed: int, energy: str = "") -> Step:
        """On the same sequences for all."""
        name = energy or path
        words = ["fairseq-earm-perplexity", str(self.data), "--path", str(self._checkpoint(path, seed)), "--cpu"]
        words += ["--max-sequences", str(SEQUENCES), "--prefix-length", str(PREFIX), "--sequence-length", str(LENGTH)]
        words += ["--json", str(self._result(name, seed))]
        if energy:
            words += ["--energy-path", str(self._checkpoint(name, seed)), "--samples", str(SAMPLES // 2), str(SAMPLES)]
        return Step(f"{name}-{seed}.perplexity", words, (f"{name}-{seed}",))

    def _result(self, name: str, seed: int) -> Path:
        return self.output / f"{name}-{seed}.json"


def perplexities(result: dict) -> Dict[str, float]:
    """Lower and upper estimate, and the gain over the base in nats per token with its standard error."""
    if "joint" not in result:
        return {"lower": result["base"]["perplexity"], "upper": result["base"]["perplexity"]}
    row = result["joint"][-1]
    return {
        "lower": row["perplexity_lower"], "upper": row["perplexity_upper"], "gain": row["gain"],
        "error": row["gain_standard_error"], "base": result["base"]["perplexity"],
    }


def print_table(output: Path) -> None:
    """One row per model, mean and spread over the seeds that were run."""
    print("| model | seeds | test perplexity, lower to upper estimate | gain over its base, nats per token |\n|---|---|---|---|")
    for name, title in NAMES.items():
        found = [perplexities(json.loads(path.read_text())) for path in sorted(output.glob(f"{name}-[0-9]*.json"))]
        if not found:
            continue
        bounds = [spread([row[bound] for row in found], 2) for bound in ("lower", "upper")]
        bounds = bounds[:1] if "gain" not in found[0] else bounds
        gain = "; ".join(f"{row['gain']:.4f} ± {row['error']:.4f}" for row in found if "gain" in row)
        print(f"| {title} | {len(found)} | {' to '.join(bounds)} | {gain} |")


def main() -> None:
    args = experiment_parser(__doc__)[0].parse_args()
    run_experiment(args, lambda: Experiment(args.data, args.output).steps(args.seeds), print_table)


if __name__ == "__main__":
    main()
