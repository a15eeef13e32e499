"""Compare ways to go on from one checkpoint: train, measure and translate, then print a table.

    compare.py run SPEC.json DATA CHECKPOINT OUTPUT [--branches A B] [--seeds 1 2 3] [--jobs 2]
    compare.py table SPEC.json OUTPUT --against BRANCH

The spec holds the flags that all branches share, and each branch's own (multi30k/branches.json). What is finished is
not done again, so a run that was stopped goes on where it was. `measure` is what `run` calls for every model.
"""
from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = ROOT / "fairseq_earm"
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from compare_table import print_table  # noqa: E402
from steps import command, done  # noqa: E402


def run(args) -> None:
    """Every branch with every seed, `--jobs` at a time."""
    spec = json.loads(args.spec.read_text())
    names = args.branches or list(spec["branches"])
    jobs = [(seed, name) for seed in args.seeds for name in names]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda job: run_one(spec, args, *job), jobs))


def run_one(spec: dict, args, seed: int, name: str) -> None:
    """Train one branch unless its checkpoint is there, then measure and translate unless that was done."""
    branch, folder = spec["branches"][name], args.output / name / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    updates = str(branch.get("updates", spec["updates"]))
    checkpoint = folder / "checkpoint_last.pt"
    if not done(folder / "train.log"):
        for left_over in folder.glob("checkpoint*.pt"):
            left_over.unlink()  # fairseq would go on from it without the optimizer's state, for all the updates once more
        command(
            ["fairseq-train", str(args.data), f"--user-dir={PLUGIN}", f"--finetune-from-model={args.checkpoint}",
             f"--save-dir={folder}", "--no-epoch-checkpoints", "--no-save-optimizer-state", "--seed", str(seed),
             "--max-update", updates, "--total-num-update", updates, "--log-format", "json", "--no-progress-bar",
             *spec["train"], *branch["flags"]],
            folder / "train.log",
        )
    judge(spec, args, folder, checkpoint, branch.get("energy_step", "last"))


def judge(spec: dict, args, folder: Path, checkpoint: Path, energy_step: str) -> None:
    """Likelihoods, and translations of the test set in the stock order."""
    if not done(folder / "measure.log"):
        command(
            [sys.executable, __file__, "measure", str(args.data), str(checkpoint), str(folder / "measure.json"),
             "--energy-step", energy_step, "--samples", str(spec["samples"])],
            folder / "measure.log",
        )
    if not done(folder / "test.log"):
        command(
            ["fairseq-generate", str(args.data), f"--user-dir={PLUGIN}", "--task", "earm_translation",
             f"--path={checkpoint}", "--no-progress-bar", *spec["generate"]],
            folder / "test.log",
        )


def measure(args) -> None:
    """Likelihoods under q and under the joint model, and the DV bound; temperatures fitted on the validation set."""
    from fairseq import checkpoint_utils

    import fairseq_earm  # noqa: F401  (so that any checkpoint can be read)
    from fairseq_earm.evaluation.likelihood import score_corpus, summarize
    from fairseq_earm.sampling import AncestralSampler

    models, _, task = checkpoint_utils.load_model_ensemble_and_task([args.checkpoint], arg_overrides={"data": args.data})
    sampler, corpora = AncestralSampler(task.target_dictionary), {}
    for split in ("valid", "test"):
        task.load_dataset(split)
        batches = task.get_batch_iterator(task.dataset(split), max_tokens=1000).next_epoch_itr(shuffle=False)
        corpora[split] = score_corpus(
            models[0].eval(), batches, sampler, samples=args.samples, energy_step=args.energy_step
        )
        assert len(corpora[split].lengths) == len(task.dataset(split))
    lengths = [len(sample) for samples in corpora["test"].samples for sample in samples]
    numbers = {**summarize(corpora["valid"], corpora["test"]), "sample_length": sum(lengths) / len(lengths)}
    args.output.write_text(json.dumps(numbers))


def table(args) -> None:
    spec = json.loads(args.spec.read_text())
    print_table(spec, args.output, args.against)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("run")
    for name in ("spec", "data", "checkpoint", "output"):
        one.add_argument(name, type=Path)
    one.add_argument("--branches", nargs="+", help="default: all of the spec")
    one.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    one.add_argument("--jobs", type=int, default=2, help="commands at a time, one thread each")
    one.set_defaults(function=run)
    one = commands.add_parser("measure")
    one.add_argument("data")
    one.add_argument("checkpoint")
    one.add_argument("output", type=Path)
    one.add_argument("--samples", type=int, default=16)
    one.add_argument("--energy-step", choices=["last", "post"], default="last")
    one.set_defaults(function=measure)
    one = commands.add_parser("table")
    one.add_argument("spec", type=Path)
    one.add_argument("output", type=Path)
    one.add_argument("--against", required=True, help="branch that BLEU differences are taken to")
    one.set_defaults(function=table)
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()
