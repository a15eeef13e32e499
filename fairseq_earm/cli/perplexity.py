"""fairseq-earm-perplexity: perplexity of a base model, and with an energy of the joint model, between bounds.

With --json the command may be killed and started again: it goes on where it stopped, to the very figures of one run.
"""
from __future__ import annotations

import argparse
import logging
import math
from itertools import chain
from typing import Iterable, List, Optional, Sequence

import torch
from tqdm import tqdm

from fairseq_earm.cli.common import check_json, device, interruptible, write_json
from fairseq_earm.cli.joint_setup import MAX_LEN_A, MAX_LEN_B, Measured, numbers, open_measured
from fairseq_earm.errors import UsageError
from fairseq_earm.evaluation.residual import measure_sequence, summarize
from fairseq_earm.evaluation.work_file import WorkFile, open_work
from fairseq_earm.sampling.blocks import cut_note
from fairseq_earm.sampling.frozen import file_hash
from fairseq_earm.sampling.store_settings import BREAK_MODES, DTYPES

logger = logging.getLogger(__name__)

DEFAULT_SAMPLES = 1000


@interruptible(", and with --json it goes on where it stopped")
def main(argv: Optional[Sequence[str]] = None) -> None:
    """The console script; prints a table."""
    args = _parser().parse_args(argv)
    _check_flags(args)
    measured = open_measured(args)
    settings = _settings(args, measured)
    with open_work(args.json, settings) as work:
        records = _measure_all(args, measured, work)
        report = {
            "conditions": measured.conditions,
            "skipped": measured.skipped,
            "cut": measured.cut,
            **summarize(records, args.samples, per_step=args.per_step),
            "settings": {"path": args.path, "energy_path": args.energy_path, **settings},
        }
        print(_table(report))
        if args.json:
            write_json(args.json, report)
        if work:
            work.remove()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fairseq-earm-perplexity", description=__doc__.split("\n")[0])
    parser.add_argument("data", help="folder of fairseq-preprocess: text, or pairs of sentences")
    parser.add_argument("--path", required=True, metavar="FILE", help="checkpoint of the base model")
    energy = parser.add_mutually_exclusive_group()
    energy.add_argument("--energy-path", metavar="FILE", help="checkpoint of an energy network; without an energy, the base alone")
    energy.add_argument("--energy", choices=["earm"], help="the base model's own energies (a model trained by E-ARM)")
    parser.add_argument(
        "--energy-step", choices=["last", "post"], default="last", help="with --energy earm: as the model was trained (default: last)",
    )
    parser.add_argument("--gen-subset", default="test", metavar="SPLIT", help="split to measure on (default: test)")
    parser.add_argument("--prefix-length", type=int, metavar="N", help="tokens that are given; by default as the energy was trained")
    parser.add_argument("--sequence-length", type=int, metavar="N", help="tokens of a sequence, prefix included; by default the energy's")
    parser.add_argument("--sample-break-mode", choices=BREAK_MODES, help="how text is cut; by default as for the energy, or none")
    parser.add_argument(
        "--max-len-a", type=float, default=MAX_LEN_A, metavar="A",
        help="pairs: samples have at most A * source length + B tokens (default: %(default)s)",
    )
    parser.add_argument("--max-len-b", type=int, default=MAX_LEN_B, metavar="B", help="see --max-len-a (default: %(default)s)")
    parser.add_argument(
        "--samples", type=numbers, nargs="+", action="extend", metavar="N",
        help="samples of each sequence for the normaliser; several numbers, as 1000,10000,100000, give the estimates from so many "
        f"of one set (default: {DEFAULT_SAMPLES})",
    )
    parser.add_argument("--per-step", action="store_true", help="text: also the perplexity at each step; the last step is exact")
    parser.add_argument("--max-sequences", type=int, metavar="N", help="measure on so many sequences, evenly spaced; by default on all")
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="samples drawn and scored at once (default: 256)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="other seeds draw other samples (default: 1)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="precision of the models' parameters (default: float32)")
    parser.add_argument("--cpu", action="store_true", help="use no GPU")
    parser.add_argument("--json", metavar="FILE", help="also write the results there; FILE.partial keeps unfinished ones meanwhile")
    return parser


def _check_flags(args: argparse.Namespace) -> None:
    """Refuse what needs no data to be seen as wrong, and put --samples in order."""
    for name in ("max_sequences", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)}: give 1 or more")
    if not 0 <= args.max_len_a < math.inf or args.max_len_b < 0 or args.max_len_a == args.max_len_b == 0:
        raise UsageError(
            f"--max-len-a {args.max_len_a:g} --max-len-b {args.max_len_b}: give finite numbers of 0 or more that leave samples a token"
        )
    if args.energy_step == "post" and not args.energy:
        raise UsageError("--energy-step post: only a model's own energies have it; give --energy earm, or leave it out")
    with_energy = bool(args.energy or args.energy_path)
    if args.samples and not with_energy:
        raise UsageError("--samples is for a normaliser, which a base model alone does not need: give an energy, or leave it out")
    args.samples = sorted({*chain(*args.samples or [[DEFAULT_SAMPLES]])}) if with_energy else []
    if args.samples and args.samples[0] < 2:
        raise UsageError(f"--samples {args.samples[0]}: the upper estimate leaves one out, so give 2 or more, {DEFAULT_SAMPLES} as a rule")
    check_json(args.json)


def _settings(args: argparse.Namespace, measured: Measured) -> dict:
    """All that the figures depend on."""
    names = ("gen_subset", "max_sequences", "samples", "per_step", "batch_size", "seed", "dtype")
    energy = f"{args.energy} {args.energy_step}" if args.energy else args.energy_path
    if args.energy_path:
        energy = file_hash(args.energy_path, flag="--energy-path")
    return {
        **{name: getattr(args, name) for name in names},
        **measured.data,
        "base": file_hash(args.path, flag="--path"),
        "energy": energy,
        "device": device(args).type,
    }


def _measure_all(args: argparse.Namespace, measured: Measured, work: Optional[WorkFile]) -> List[dict]:
    """A record of every sequence, in order; those in the work file are not measured again."""
    records = dict(work.records) if work else {}
    missing = [index for index in measured.indices if index not in records]
    if records:
        logger.info("%d of %d sequences were measured before", len(records), len(measured.indices))
    for index in _progress(missing, len(measured.indices)):
        records[index] = _measure(args, measured, index)
        if work:
            work.add(records[index])
    return [records[index] for index in measured.indices]


def _progress(missing: List[int], total: int) -> Iterable[int]:
    return tqdm(missing, desc="perplexity", total=total, initial=total - len(missing), unit="sequence", disable=None)


def _measure(args: argparse.Namespace, measured: Measured, index: int) -> dict:
    try:
        return measure_sequence(
            measured.model, measured.item(index), index=index, samples=args.samples, per_step=args.per_step, seed=args.seed
        )
    except torch.cuda.OutOfMemoryError:
        raise UsageError(f"--batch-size {args.batch_size}: so many samples do not fit on the GPU; give a smaller number") from None


def _table(report: dict) -> str:
    lines = [report["conditions"]]
    left_out = f"; {report['skipped']:,} of another length skipped" if report["skipped"] else ""
    left_out += cut_note(report["cut"])
    counts = f"{report['sequences']:,} sequences, {report['tokens']:,} predicted tokens"
    lines += [f"{counts}{left_out}. Perplexity per token:", ""]
    bounds = f" {'lower':>10} {'upper':>10} {'gain, nats':>12}" if "joint" in report else ""
    lines += [f"{'':<24}{bounds}".rstrip(), _row("base", *[report["base"]["perplexity"]] * (2 if bounds else 1))]
    for row in report.get("joint", []):
        error = row["gain_standard_error"]
        gain = f"{row['gain']:+.4f}" + (f" ± {error:.4f}" if error is not None else "")
        lines.append(_row(f"joint, {row['samples']:,} samples", row["perplexity_lower"], row["perplexity_upper"], rest=gain))
    if "joint" in report:
        lines += ["", "gain: base NLL − joint NLL (upper) per token, ± its standard error over sequences"]
    if "steps" in report:
        names = [name for name in ("base", "lower", "upper") if name in report["steps"][0]]
        lines += ["", f"{'step':<24} " + " ".join(f"{name:>10}" for name in names)]
        lines += [_row(str(row["step"]), *(row[name] for name in names)) for row in report["steps"]]
    return "\n".join(lines)


def _row(name: str, *values: float, rest: str = "") -> str:
    return " ".join([f"{name:<24}", *(f"{value:10.4f}" for value in values), rest]).rstrip()
