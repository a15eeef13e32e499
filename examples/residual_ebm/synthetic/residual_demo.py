"""Residual energies on a text whose distribution is known: are the learnt energy, log Z and perplexity what they should be?

Trains a language model that is too small for the text, energies on its residual (UNIT and BIT), samples from the joint
model, estimates perplexities between bounds, and compares each with its exact value. Some minutes on two cores.
"""
from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import List, Optional

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
sys.path[:0] = [str(HERE), str(ROOT / "examples"), str(ROOT)]

import anagrams  # noqa: E402
import residual_report as report  # noqa: E402
import residual_settings as settings  # noqa: E402
from steps import Step, run_steps  # noqa: E402

PLUGIN = ROOT / "fairseq_earm"
SPLIT_SEEDS = {"train": 1, "valid": 2, "test": 3}
LOG = "preprocess.log"


class Demo:
    """All commands of one run, their files under one folder."""

    def __init__(self, output: Path, size: settings.Size):
        self.output, self.size = output, size
        self.text, self.data = output / "text", output / "data"

    def prepare(self) -> None:
        """Clear what an earlier run left, and write the text."""
        shutil.rmtree(self.output, ignore_errors=True)
        self.text.mkdir(parents=True)
        for split, seed in SPLIT_SEEDS.items():
            lines = anagrams.sample_lines(getattr(self.size, split), seed)
            (self.text / f"{split}.txt").write_text("".join(" ".join(line) + "\n" for line in lines))

    def steps(self) -> List[Step]:
        prefixes = [f"--{split}pref={self.text / split}.txt" for split in SPLIT_SEEDS]
        steps = [Step("preprocess", ["fairseq-preprocess", "--only-source", *prefixes, f"--destdir={self.data}", "--workers", "1"])]
        steps.append(self._train("base", settings.base_flags(self.size), "preprocess"))
        runs = [(name, seed) for seed in self.size.seeds for name in settings.ENERGIES]
        steps += [
            self._train(f"{name}-{seed}", settings.energy_flags(name, self.size, self._checkpoint("base"), seed), "base")
            for name, seed in runs
        ]
        for name, seed in runs:
            steps += self._judge(f"{name}-{seed}", seed)
        return [*steps, self._generate("base", [], "base")]

    def _checkpoint(self, name: str) -> str:
        return str(self.output / name / "checkpoint_last.pt")

    def _train(self, name: str, flags: List[str], need: str) -> Step:
        words = ["fairseq-train", str(self.data), f"--user-dir={PLUGIN}", f"--save-dir={self.output / name}", *flags]
        return Step(name, words, (need,))

    def _judge(self, name: str, seed: int) -> List[Step]:
        """Exact figures, estimated perplexity, and joint samples of one energy."""
        base, energy = self._checkpoint("base"), self._checkpoint(name)
        exact = [sys.executable, str(HERE / "residual_measure.py"), str(self.data), str(self.text), base, energy]
        exact += [str(self.output / f"{name}.exact.json"), "--count", str(self.size.exact)]
        estimate = ["fairseq-earm-perplexity", str(self.data), "--path", base, "--energy-path", energy, "--cpu"]
        estimate += ["--samples", str(self.size.samples), "--json", str(self.output / f"{name}.perplexity.json"), "--seed", str(seed)]
        estimate += ["--max-sequences", str(2 * self.size.exact)]
        flags = ["--energy-path", energy, "--energy-candidates", str(self.size.samples), "--energy-select", "resample"]
        steps = [Step(f"{name}.exact", exact, (name,)), Step(f"{name}.perplexity", estimate, (name,))]
        return [*steps, self._generate(name, flags, name)]

    def _generate(self, name: str, flags: List[str], need: str) -> Step:
        """One continuation of each first half of the test set."""
        words = ["fairseq-generate", str(self.data), f"--user-dir={PLUGIN}", "--task", "residual_language_modeling"]
        words += ["--path", self._checkpoint("base"), "--prefix-length", str(settings.PREFIX), "--sequence-length"]
        words += [str(settings.LENGTH), "--sampling", "--beam", "1", "--cpu", "--no-progress-bar", "--num-workers", "0", *flags]
        return Step(f"{name}.samples", words, (need,))


def main(arguments: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo-residual-output"), help="folder for everything that is written")
    parser.add_argument("--quick", action="store_true", help="a few updates and lines: checks that all parts work")
    parser.add_argument("--jobs", type=int, default=2, help="commands at a time, one thread each")
    args = parser.parse_args(arguments)
    if args.output.exists() and any(args.output.iterdir()) and not (args.output / LOG).exists():
        parser.error(f"{args.output} holds files that are no demonstration's; name another folder with --output")
    demo = Demo(args.output, settings.QUICK if args.quick else settings.FULL)
    demo.prepare()
    run_steps(demo.steps(), args.output, args.jobs)
    report.write(args.output, demo.size)


if __name__ == "__main__":
    main()
