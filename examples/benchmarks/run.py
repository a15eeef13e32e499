"""What E-ARM costs: tables of time and memory, each variant beside what would be run otherwise.

    run.py [TABLE ...] [--full] [--threads 1] [--rounds 5] [--dtype float32] [--json FILE] [--plots FOLDER]
           [--checkpoint FILE --data FOLDER]
    run.py TABLE --with NAME=VALUE ...

Without a name, all tables. --with gives a size of one table, a parameter of its `rows`, in JSON: sizes='["iwslt"]', batches=[128].
The tables run one after the other; the variants that are compared in turns, in one process, so that a busy machine slows
all of them down. On the GPU where there is one.
"""
from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

import fairseq_earm  # noqa: E402, F401  (mends the installed versions)

import bf16  # noqa: E402
import growth  # noqa: E402
import loss_head  # noqa: E402
import offline  # noqa: E402
import operators  # noqa: E402
import reranking  # noqa: E402
import sampler  # noqa: E402
import update  # noqa: E402
import ways  # noqa: E402
from tables import DTYPES, Setting, show  # noqa: E402
from timing import be_quiet, machine  # noqa: E402

MODULES = (update, ways, sampler, operators, bf16, reranking, offline, growth, loss_head)
TABLES = {module.__name__: module.TABLE for module in MODULES}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(TABLES)}; by default all of them")
    parser.add_argument("--full", action="store_true", help="all sizes: hours, where the others are minutes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each variant")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="for what runs without gradients")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the figures here")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw what can be drawn")
    parser.add_argument("--checkpoint", metavar="FILE", help="a trained transformer for translation, for natural lengths")
    parser.add_argument("--data", metavar="FOLDER", help="with the dictionaries of --checkpoint")
    parser.add_argument("--with", dest="sizes", action="append", default=[], metavar="NAME=VALUE", help="a size of the one table named")
    return parser


def main() -> None:
    options = parser()
    args = options.parse_args()
    unknown = [name for name in args.tables if name not in TABLES]
    if unknown:
        options.error(f"no table {unknown[0]!r}: there are {', '.join(TABLES)}")
    if bool(args.checkpoint) != bool(args.data):
        options.error("--checkpoint and --data go together")
    if args.plots and importlib.util.find_spec("matplotlib") is None:
        options.error("--plots: draws with matplotlib, which is not installed; install it, or leave --plots out")
    if args.sizes and len(args.tables) != 1:
        options.error("--with goes with one table")
    sizes = {name: json.loads(value) for name, _, value in (size.partition("=") for size in args.sizes)}
    be_quiet()
    torch.set_num_threads(args.threads)
    setting = Setting(args.rounds, args.threads, args.dtype, args.checkpoint, args.data)
    figures = {"machine": machine(), **setting._asdict(), "tables": {}}
    for name in args.tables or TABLES:
        table = TABLES[name]
        rows = table.measure(setting, **{**(table.full if args.full else table.quick), **sizes})
        print(show(table, rows, setting), flush=True)
        figures["tables"][name] = rows
        if args.json:
            args.json.write_text(json.dumps(figures, indent=1))
        if args.plots and table.plot:
            args.plots.mkdir(parents=True, exist_ok=True)
            table.plot(rows, args.plots / f"{name}.png")


if __name__ == "__main__":
    main()
