"""Compare ways to train from one checkpoint, or from the beginning: train, measure and translate, then print a table.

    compare.py run SPEC.json DATA CHECKPOINT OUTPUT [--branches A B] [--seeds 1 2 3] [--jobs 2] [--against BRANCH]
    compare.py table SPEC.json OUTPUT [--against BRANCH]

CHECKPOINT is what every branch goes on from; `-` trains each from the beginning. The spec (multi30k/branches.json) holds the
flags that all branches share (`train`), how long they train (`updates`, or `epochs`), how they translate (`generate`: flags,
or a name and flags for each of several ways) and each branch's own flags, with `updates` or `epochs` of its own if it has
them. `against`, for all or in a branch, names the branch that BLEU is compared with. What is finished is not done again, so
a run that was stopped goes on where it was. `measure` is what `run` calls for every model.
"""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import List

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = ROOT / "fairseq_earm"
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from compare_table import generations, print_table  # noqa: E402
from steps import Step, done, run_steps  # noqa: E402

from fairseq_earm.errors import UsageError  # noqa: E402

BEGINNING = Path("-")
SPEC_KEYS = ["train", "generate", "samples", "branches"]
AGAINST = "branch that all BLEU differences are taken to (default: what the spec says)"


def read_spec(path: Path) -> dict:
    """What a spec says.

    Raises:
        UsageError: a file that is no spec, or that names a branch which it does not have.
    """
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}") from None
    missing = [key for key in SPEC_KEYS if not isinstance(spec, dict) or not spec.get(key)]
    if missing:
        raise UsageError(f"{path} has no {', '.join(missing)}; multi30k/branches.json is an example")
    for name, branch in spec["branches"].items():
        if "flags" not in branch:
            raise UsageError(f"{path}: branch {name} has no flags; give it the criterion's and the learning rate, or []")
        _length(spec, branch, f"{path}: branch {name}")
    for name in [spec.get("against"), *(branch.get("against") for branch in spec["branches"].values())]:
        check_branches(spec, f"{path}, against:", [name] if name else [])
    for name in [*spec["branches"], *(spec["generate"] if isinstance(spec["generate"], dict) else [])]:
        if "/" in name:
            raise UsageError(f"{path}: {name} names files, so it cannot hold a slash")
    return spec


def check_branches(spec: dict, where: str, names: List[str]) -> None:
    """Raise a UsageError that begins with `where` if a name is none of the spec's branches."""
    for name in names:
        if name not in spec["branches"]:
            raise UsageError(f"{where} {name} is no branch of the spec; it has {', '.join(spec['branches'])}")


def _length(spec: dict, branch: dict, where: str) -> List[str]:
    """Flags that say how long a branch trains: the branch's own updates or epochs before the spec's."""
    own = branch if {"updates", "epochs"} & branch.keys() else spec
    if ("updates" in own) == ("epochs" in own):
        found = "both updates and epochs" if "updates" in own else "neither updates nor epochs"
        raise UsageError(f"{where} has {found}: give one of them")
    if "epochs" in own:
        return ["--max-epoch", str(own["epochs"])]
    return ["--max-update", str(own["updates"]), "--total-num-update", str(own["updates"])]


def run(args) -> None:
    """Every branch with every seed, `--jobs` at a time, and the table."""
    spec = read_spec(args.spec)
    names = args.branches or list(spec["branches"])
    check_branches(spec, "--branches:", names)
    check_branches(spec, "--against:", [args.against] if args.against else [])
    if not args.data.is_dir():
        raise UsageError(f"{args.data}: no such folder of binary data; run the recipe's prepare.sh first")
    if args.checkpoint != BEGINNING and not args.checkpoint.is_file():
        raise UsageError(f"{args.checkpoint}: no such checkpoint; train it first, or give - to train from the beginning")
    runs = [(seed, name) for seed in args.seeds for name in names]
    if args.checkpoint != BEGINNING:
        for seed, name in runs:
            remove_unfinished(args.output / name / f"seed{seed}")
    run_steps([step for seed, name in runs for step in branch_steps(spec, args, seed, name)], args.output, args.jobs)
    print_table(spec, args.output, args.against)


def remove_unfinished(folder: Path) -> None:
    """Delete checkpoints of a training that was cut off, which then starts once more from the checkpoint given."""
    if not done(folder / "train.log"):
        for left_over in folder.glob("checkpoint*.pt"):
            left_over.unlink()  # fairseq would go on from it without the optimizer's state, for all the updates once more


def branch_steps(spec: dict, args, seed: int, name: str) -> List[Step]:
    """A branch's training with a seed; then likelihoods, and the test set translated in every way of the spec."""
    branch, run_name = spec["branches"][name], f"{name}/seed{seed}"
    folder = args.output / run_name
    checkpoint = folder / "checkpoint_last.pt"
    train = Step(
        f"{run_name}/train",
        ["fairseq-train", str(args.data), f"--user-dir={PLUGIN}", *start_flags(args.checkpoint),
         f"--save-dir={folder}", "--no-epoch-checkpoints", "--seed", str(seed), *_length(spec, branch, name),
         "--log-format", "json", "--no-progress-bar", *spec["train"], *branch["flags"]],
    )
    likelihoods = Step(
        f"{run_name}/measure",
        [sys.executable, __file__, "measure", str(args.data), str(checkpoint), str(folder / "measure.json"),
         "--energy-step", branch.get("energy_step", "last"), "--samples", str(spec["samples"])],
        (train.name,),
    )
    translate = ["fairseq-generate", str(args.data), f"--user-dir={PLUGIN}", "--task", "earm_translation",
                 f"--path={checkpoint}", "--seed", str(seed), "--no-progress-bar"]
    ways = generations(spec).items()
    return [train, likelihoods, *[Step(f"{run_name}/{way}", [*translate, *flags], (train.name,)) for way, flags in ways]]


def start_flags(checkpoint: Path) -> List[str]:
    """Where a training starts: from a checkpoint; or from the beginning and, after a kill, where it was."""
    return [] if checkpoint == BEGINNING else [f"--finetune-from-model={checkpoint}", "--no-save-optimizer-state"]


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
    """The table of what has finished."""
    print_table(read_spec(args.spec), args.output, args.against)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("run")
    for name in ("spec", "data"):
        one.add_argument(name, type=Path)
    one.add_argument("checkpoint", type=Path, help="what every branch goes on from; - for none")
    one.add_argument("output", type=Path)
    one.add_argument("--branches", nargs="+", help="default: all of the spec")
    one.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    one.add_argument("--jobs", type=int, default=2, help="commands at a time, one thread each")
    one.add_argument("--against", help=AGAINST)
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
    one.add_argument("--against", help=AGAINST)
    one.set_defaults(function=table)
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()
