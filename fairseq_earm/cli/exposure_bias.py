"""fairseq-earm-exposure-bias: how often a model is surer of the reference's words than another, each reading its own translation.

With --json the command may be killed and started again: it goes on where it stopped, to the very figures of one run.
"""
from __future__ import annotations

import argparse
import logging
import random
from typing import List, Optional, Sequence

import torch
from tqdm import tqdm

from fairseq_earm.cli.common import (
    check_json, check_png, check_seed, device, drawing, interruptible, write_json, writing,
)
from fairseq_earm.errors import UsageError
from fairseq_earm.evaluation.exposure_bias import CONTEXTS, measure_pairs, summarize
from fairseq_earm.evaluation.translate import Translator, fitting, open_translators, pairs_hash
from fairseq_earm.evaluation.work_file import WorkFile, open_work
from fairseq_earm.sampling.frozen import file_hash

logger = logging.getLogger(__name__)


@interruptible(", and with --json it goes on where it stopped")
def main(argv: Optional[Sequence[str]] = None) -> None:
    """The console script; prints a table."""
    args = _parser().parse_args(argv)
    _check_flags(args)
    plot = drawing("exposure_plot", "--plot draws", "install it, or leave the flag out") if args.plot else None
    translators = open_translators(
        [("--path", args.path), ("--against", args.against)], args.data, args.gen_subset, device=device(args)
    )
    indices = _drawn(args, translators)
    settings = _settings(args, translators, indices)
    with open_work(args.json, settings) as work:
        records = _measure_all(args, translators, indices, work)
        report = {**summarize(records, seed=args.seed), "settings": {"a": args.path, "b": args.against, **settings}}
        print(_table(args, report))
        if plot:
            with writing("--plot", args.plot):
                plot.ratios_by_position(report["by_position"], args.plot)
        if args.json:
            write_json(args.json, report)
        if work:
            work.remove()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fairseq-earm-exposure-bias", description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("data", help="folder of fairseq-preprocess, pairs of sentences")
    parser.add_argument("--path", required=True, metavar="A.pt", help="checkpoint of the model hoped to be the better one, A")
    parser.add_argument("--against", required=True, metavar="B.pt", help="checkpoint of the model that it is compared with, B")
    parser.add_argument("--gen-subset", default="train", metavar="SPLIT", help="split that the pairs are drawn from")
    parser.add_argument("--pairs", type=int, default=1000, metavar="N", help="pairs drawn, each at most once")
    parser.add_argument("--beam", type=int, default=5, metavar="N", help="of the search for each model's own translation")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="pairs at once")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="other seeds draw other pairs")
    parser.add_argument("--cpu", action="store_true", help="use no GPU")
    parser.add_argument("--json", metavar="FILE", help="also write the results there; FILE.partial keeps unfinished ones meanwhile")
    parser.add_argument("--plot", metavar="FILE.png", help="also draw the ratio by position in the sentence")
    return parser


def _check_flags(args: argparse.Namespace) -> None:
    """Refuse what needs no model to be seen as wrong."""
    for name in ("pairs", "beam", "batch_size"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)}: give 1 or more")
    check_seed(args.seed)
    check_json(args.json)
    if args.plot:
        check_png(args.plot, flag="--plot")


def _drawn(args: argparse.Namespace, translators: Sequence[Translator]) -> List[int]:
    """Numbers of the pairs, those with sources of like length together."""
    usable = fitting(translators)
    if args.pairs > len(usable):
        logger.warning("--pairs %d: %s has %d that both models read; all are taken", args.pairs, args.gen_subset, len(usable))
    drawn = random.Random(args.seed).sample(usable, min(args.pairs, len(usable)))
    sizes = translators[0].dataset.src_sizes
    return sorted(drawn, key=lambda index: (int(sizes[index]), index))


def _settings(args: argparse.Namespace, translators: Sequence[Translator], indices: Sequence[int]) -> dict:
    """All that the figures depend on."""
    return {
        **{name: getattr(args, name) for name in ("gen_subset", "beam", "batch_size", "seed")},
        "pairs": len(indices),
        "text_sha256": pairs_hash(translators[0].dataset, indices),
        "a_sha256": file_hash(args.path, flag="--path"),
        "b_sha256": file_hash(args.against, flag="--against"),
        "device": device(args).type,
    }


def _measure_all(
    args: argparse.Namespace, translators: Sequence[Translator], indices: Sequence[int], work: Optional[WorkFile]
) -> List[dict]:
    """A record of every pair, in order; batches that the work file has whole are not measured again."""
    records = dict(work.records) if work else {}
    if records:
        logger.info("%d of %d pairs were measured before", len(records), len(indices))
    batches = [indices[at : at + args.batch_size] for at in range(0, len(indices), args.batch_size)]
    with tqdm(desc="exposure bias", total=len(indices), initial=len(records), unit="pair", disable=None) as progress:
        for batch in batches:
            missing = [index for index in batch if index not in records]
            for record in _measure(args, translators, batch) if missing else []:
                if record["index"] in missing:
                    records[record["index"]] = record
                    if work:
                        work.add(record)
            progress.update(len(missing))
    return [records[index] for index in indices]


def _measure(args: argparse.Namespace, translators: Sequence[Translator], batch: Sequence[int]) -> List[dict]:
    try:
        return measure_pairs(translators, batch, beam=args.beam)
    except torch.cuda.OutOfMemoryError:
        raise UsageError(f"--batch-size {args.batch_size}: so many pairs do not fit on the GPU; give a smaller number") from None


def _table(args: argparse.Namespace, report: dict) -> str:
    words, missed = report["words"], report["not_reached"]
    lines = [
        f"{report['pairs']:,} pairs of {args.gen_subset}; {words + missed:,} reference words, as the dictionary has them, without "
        "end-of-sentence.",
        f"The translations (beam {args.beam}) of both models reach {words:,}, which count; {missed:,} they do not.",
        f"A: {args.path}",
        f"B: {args.against}",
        "",
        f"{'':<26} {'A':>9} {'B':>9} {'ties':>9} {'ratio':>8}   95 % interval",
    ]
    for measure, name in (("probability", "likelier under"), ("rank", "of better rank under")):
        lines.append(name)
        for context, row_name in zip(CONTEXTS, ("own contexts", "the reference as context")):
            row = report[measure][context]
            counts = " ".join(f"{row[count]:9,}" for count in ("greater", "less", "ties"))
            lines.append(f"  {row_name:<24} {counts} {_figures(row, '.4f')}")
        lines.append(f"  {'difference':<24} {'':>29} {_figures(report[measure]['difference'], '+.4f')}")
    lines += [
        "",
        "Ratio: A / (A + B); 0.5 is equality. Intervals: bootstrap over pairs. A better model is above 0.5 in either context.",
        "A merely sharper or flatter softmax moves the ratios of probabilities, and their difference, but no ranks.",
    ]
    return "\n".join(lines)


def _figures(row: dict, form: str) -> str:
    if row["ratio"] is None:
        return f"{'-':>8}"
    low, high = (format(value, form) for value in row["interval"])
    return f"{format(row['ratio'], form):>8}   {low} to {high}"
