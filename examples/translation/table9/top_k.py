"""Top-K energy resampling at inference, after Table 9 of the E-ARM paper: candidates chosen with and without energy.

    top_k.py run DATA OUTPUT --models earm=PATH control=PATH [--seeds 1 2] [--jobs 2]
    top_k.py table OUTPUT

A PATH may hold {seed}: each seed then has a checkpoint of its own. All of it stock commands on one thread each, printed so
that they can be copied. What is finished is not done again, so a run that was stopped goes on where it was.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional

ROOT = Path(__file__).resolve().parents[3]
PLUGIN = ROOT / "fairseq_earm"
sys.path[:0] = [str(ROOT), str(ROOT / "examples"), str(ROOT / "examples" / "translation")]

from compare_table import bleu_cell, bleu_of_seeds, difference  # noqa: E402
from steps import Step, experiment_parser, run_experiment  # noqa: E402

from fairseq_earm.errors import UsageError  # noqa: E402

GENERATE = ["--gen-subset", "test", "--cpu", "--max-tokens", "4000", "--remove-bpe"]
BEAMS = (5, 10)
TOP_K = (5, 10, 40)
SAMPLES = 10  # of each sentence, from the K likeliest tokens at every step
WEIGHTS = ("0.1", "1")  # of the energy, beside 0


class Row(NamedTuple):
    """One way to translate.

    Attributes:
        name: its logs are MODEL/seedN/NAME.log.
        candidates, chosen: what the table calls them.
        weight: of the energy; "" where it is not asked for.
        flags: of fairseq-generate.
        without: name of the row with the same candidates and no energy.
    """

    name: str
    candidates: str
    chosen: str
    weight: str
    flags: List[str]
    without: Optional[str] = None


def rows() -> List[Row]:
    """K = 0 first, then every set of candidates, its row without energy before those with it."""
    beams = {n: Row(f"beam{n}", f"beam {n}", "likeliest", "", ["--beam", str(n)]) for n in (1, *BEAMS)}
    found = list(beams.values())
    for n in BEAMS:
        candidates = beams[n]._replace(name=f"beam{n}-best", candidates=f"the beam's {n}", chosen="best")
        found += [_with_energy(candidates, weight, without=beams[n].name) for weight in WEIGHTS]
    for k in TOP_K:
        sampling = ["--sampling", "--sampling-topk", str(k), "--beam", str(SAMPLES), "--nbest", str(SAMPLES)]
        for chosen, weights in (("drawn", WEIGHTS[-1:]), ("best", WEIGHTS)):
            samples = Row(f"top{k}-{chosen}", f"{SAMPLES} samples, K = {k}", chosen, "", sampling)
            without = _with_energy(samples, "0")
            found += [without, *(_with_energy(samples, weight, without.name) for weight in weights)]
    return found


def _with_energy(row: Row, weight: str, without: Optional[str] = None) -> Row:
    select = {"drawn": "resample", "best": "best"}[row.chosen]
    flags = [*row.flags, "--energy-rerank", "--energy-select", select, "--energy-weight", weight]
    return row._replace(name=f"{row.name}-{weight}", weight=weight, flags=flags, without=without)


def steps(data: Path, output: Path, models: Dict[str, str], seeds: List[int], energy_step: str) -> List[Step]:
    """Every row with every model and seed.

    Raises:
        UsageError: data or a checkpoint that is not there.
    """
    if not data.is_dir():
        raise UsageError(f"{data}: no such folder of binary data; run the recipe's prepare.sh first")
    found = []
    for seed in seeds:
        for model, path in models.items():
            checkpoint = Path(path.replace("{seed}", str(seed)))
            if not checkpoint.is_file():
                raise UsageError(f"--models {model}={path}: no checkpoint {checkpoint}; train it first or name another")
            (output / model / f"seed{seed}").mkdir(parents=True, exist_ok=True)
            words = [
                "fairseq-generate", str(data), f"--user-dir={PLUGIN}", "--task", "earm_translation", f"--path={checkpoint}",
                "--seed", str(seed), "--no-progress-bar", *GENERATE, "--energy-step", energy_step,
            ]
            found += [Step(f"{model}/seed{seed}/{row.name}", [*words, *row.flags]) for row in rows()]
    return found


def print_table(output: Path) -> None:
    """One Markdown row per way to translate, for every model its BLEU and what the energy changes."""
    models = sorted({path.parent.name for path in output.glob("*/seed*")})
    if not models:
        raise UsageError(f"{output} holds no results: `top_k.py run` comes first")
    titles = " | ".join(f"{model}: seeds | BLEU | the energy's part" for model in models)
    print(f"| candidates | chosen | energy's weight | {titles} |")
    print("|" + "---|" * (3 + 3 * len(models)))
    for row in rows():
        cells = [row.candidates, row.chosen, row.weight]
        for model in models:
            seeds = bleu_of_seeds(output / model, row.name)
            part = difference(seeds, bleu_of_seeds(output / model, row.without)) if row.without else ""
            cells += [str(len(seeds)), bleu_cell(seeds), part]
        print(f"| {' | '.join(cells)} |")


def _model(text: str):
    name, _, path = text.partition("=")
    if not name or not path or "/" in name:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    return name, path


def main() -> None:
    parser, run = experiment_parser(__doc__)
    run.add_argument(
        "--models", nargs="+", type=_model, required=True, metavar="NAME=PATH", help="checkpoints; {seed} stands for the seed",
    )
    run.add_argument(
        "--energy-step", choices=["last", "post"], default="last", help="post for models trained with --earm-energy-steps post",
    )
    args = parser.parse_args()
    run_experiment(args, lambda: steps(args.data, args.output, dict(args.models), args.seeds, args.energy_step), print_table)


if __name__ == "__main__":
    main()
