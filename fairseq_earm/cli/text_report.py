"""fairseq-earm-analyse report: data beside samples of a base and its joint model, in numbers and figures."""
from __future__ import annotations

import argparse
import itertools
import json
import math
import os
from typing import Dict, List, NamedTuple

import torch
from fairseq.data import Dictionary
from torch import Tensor
from tqdm import tqdm

from fairseq_earm.cli.common import POST_PROCESS, drawing, write_text, writing
from fairseq_earm.cli.joint_setup import Measured, numbers, open_measured, spread
from fairseq_earm.ebm.partition import log_partition
from fairseq_earm.ebm.weights import effective_sample_size, resample
from fairseq_earm.errors import UsageError
from fairseq_earm.evaluation.data_folder import check_data_folder
from fairseq_earm.evaluation.residual import measure_sequence, sequence_seed, summarize
from fairseq_earm.evaluation.text_analysis import ORDERS, summarize_texts
from fairseq_earm.joint_generation import draw_candidates, finite
from fairseq_earm.sampling.blocks import cut_note
from fairseq_earm.sampling.continuation import ContinuationSampler
from fairseq_earm.sampling.frozen import file_hash
from fairseq_earm.sampling.store_settings import BREAK_MODES, DTYPES

SOURCES = ("data", "base", "joint")
DEFAULT_SAMPLES = [10, 30, 100]


class Drawn(NamedTuple):
    """One continuation of a prefix from each source, with its log-probability under both models.

    Attributes:
        tokens: source → (T,).
        base: source → log P_LM, in nats.
        joint: source → log P_LM − E − log Z, log Z estimated from below by the candidates.
        log_z: its estimates from below and above.
        sample_size: effective sample size of the candidates.
    """

    tokens: Dict[str, Tensor]
    base: Dict[str, float]
    joint: Dict[str, float]
    log_z: List[float]
    sample_size: float


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this command."""
    parser.add_argument("data", help="folder of fairseq-preprocess")
    parser.add_argument("--path", required=True, metavar="FILE", help="checkpoint of the base, a language model")
    parser.add_argument("--energy-path", required=True, metavar="FILE", help="checkpoint of the energy network")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where report.json, the figures and the texts go")
    parser.add_argument("--gen-subset", default="test", metavar="SPLIT", help="split whose prefixes are continued")
    parser.add_argument("--prefix-length", type=int, metavar="N", help="by default as the energy was trained")
    parser.add_argument("--sequence-length", type=int, metavar="N", help="by default as the energy was trained")
    parser.add_argument("--sample-break-mode", choices=BREAK_MODES, help="by default as the energy was trained")
    parser.add_argument("--max-sequences", type=int, default=200, metavar="N", help="prefixes, evenly spaced over the split")
    parser.add_argument(
        "--energy-candidates", type=int, default=100, metavar="N", help="base samples from which each joint sample is drawn"
    )
    parser.add_argument(
        "--perplexity", metavar="FILE",
        help="JSON of fairseq-earm-perplexity --per-step with several --samples, for the last two figures; without it the "
        "perplexity is measured here, on --perplexity-sequences with --samples",
    )
    parser.add_argument(
        "--perplexity-sequences", type=int, default=20, metavar="N", help="sequences whose perplexity is measured"
    )
    parser.add_argument(
        "--samples", type=numbers, nargs="+", metavar="N",
        help="samples of each of them and of each step; several numbers, as 10,30,100, give several estimates (10,30,100 if not given)",
    )
    parser.add_argument(
        "--post-process", choices=POST_PROCESS, metavar="SYMBOL", help="how to join subwords in the texts written, as in fairseq-generate"
    )
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="samples drawn and scored at once")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="other seeds draw other samples")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="precision of the models' parameters")
    parser.add_argument("--cpu", action="store_true", help="use no GPU")
    parser.set_defaults(run=run, energy=None)


def run(args: argparse.Namespace) -> None:
    """Draw, measure, write and print."""
    _check_flags(args)
    plots = drawing("plots", "fairseq-earm-analyse report draws figures")
    measured = open_measured(args)
    perplexity = _read_perplexity(args, measured) if args.perplexity else None
    drawn = [_draw(args, measured, index) for index in tqdm(measured.indices, desc="samples", unit="prefix", disable=None)]
    if perplexity is None:
        perplexity = _measure(args, measured)
    report = _report(args, measured, drawn, perplexity)
    print(_table(report))
    _write(args, report, drawn, measured.model.dictionary, measured)
    with writing("--output", args.output):
        _draw_figures(plots, args.output, report)
    print(f"Numbers, figures and texts are in {args.output}")


def _check_flags(args: argparse.Namespace) -> None:
    check_data_folder(args.data)
    if not os.path.isfile(os.path.join(args.data, "dict.txt")):
        raise UsageError(f"{args.data} has no dict.txt: give a folder that fairseq-preprocess --only-source wrote")
    for name, least in (("max_sequences", 1), ("energy_candidates", 2), ("perplexity_sequences", 1), ("batch_size", 1)):
        if getattr(args, name) < least:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)}: give {least} or more")
    args.samples = sorted({*itertools.chain(*args.samples or [DEFAULT_SAMPLES])})
    if args.samples[0] < 2:
        raise UsageError(f"--samples {args.samples[0]}: the upper estimate leaves one out, so give 2 or more")
    try:
        os.makedirs(args.output, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output {args.output} cannot be made: {error.strerror}") from None
    if not os.access(args.output, os.W_OK):
        raise UsageError(f"--output {args.output} cannot be written: no leave to write there; give another")


def _read_perplexity(args: argparse.Namespace, measured: Measured) -> dict:
    """What fairseq-earm-perplexity wrote about the same two models and the same text."""
    path = args.perplexity
    try:
        with open(path, encoding="utf-8") as file:
            report = json.load(file)
        found = {"base": report["base"], "joint": report["joint"], **{k: report[k] for k in ("steps",) if k in report}}
        settings = report["settings"]
        models = {"--path": (args.path, settings["base"]), "--energy-path": (args.energy_path, settings["energy"])}
        text = {name: settings[name] for name in measured.data}
        _check_drawn(found)
    except OSError as error:
        raise UsageError(f"--perplexity {path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UsageError(f"--perplexity {path} is not what fairseq-earm-perplexity --energy-path ... --json wrote") from None
    for flag, (model, digest) in models.items():
        if file_hash(model, flag=flag) != digest:
            raise UsageError(f"--perplexity {path} was measured with another checkpoint than {flag} {model}: measure this one")
    if text != measured.data:
        raise UsageError(
            f"--perplexity {path} was measured on other sequences than these, of --gen-subset {args.gen_subset}: measure these, with "
            "the same lengths"
        )
    return found


def _check_drawn(found: dict) -> None:
    """Look at every number that goes into the figures, before hours of work.

    Raises:
        ValueError, or others: something is none.
    """
    rows = [[found["base"]["perplexity"]]]
    rows += [[row[name] for name in ("samples", "perplexity_lower", "perplexity_upper")] for row in found["joint"]]
    rows += [[row[name] for name in ("step", "base", "lower", "upper") if name in row] for row in found.get("steps", [])]
    for number in itertools.chain(*rows):
        if type(number) not in (int, float) or not (0 < number < 1e300 or number == math.inf):
            raise ValueError("not a number that a perplexity can be")
    if len({frozenset(row) for row in found.get("steps", [])}) > 1:
        raise ValueError("steps of several kinds")


def _draw(args: argparse.Namespace, measured: Measured, index: int) -> Drawn:
    """Text and log-probabilities of one prefix; its random numbers depend on the seed and the prefix alone."""
    model, item = measured.model, measured.item(index)
    prefix, own = item[: model.prefix_length], item[model.prefix_length :]
    generator = torch.Generator(item.device).manual_seed(sequence_seed(args.seed, index, 0))
    candidates = draw_candidates(
        model.base, model.energies, ContinuationSampler(model.dictionary, own.numel()), prefix.unsqueeze(0),
        args.energy_candidates, chunk=args.batch_size, generator=generator,
    )
    neg_energies, log_q = candidates.neg_energies[0].double(), candidates.log_q[0].double().sum(1)
    chosen = {"base": 0, "joint": int(resample(neg_energies, generator)[0])}
    tokens = {"data": own, **{source: candidates.tokens[0, i] for source, i in chosen.items()}}
    base = {"data": model.base_log_probs(item).double().sum().item(), **{s: log_q[i].item() for s, i in chosen.items()}}
    energy = {"data": -finite(model.energy(item)).item(), **{source: neg_energies[i].item() for source, i in chosen.items()}}
    log_z = log_partition(neg_energies)
    joint = {source: base[source] + energy[source] - log_z.lower.item() for source in SOURCES}
    tokens = {source: row.cpu() for source, row in tokens.items()}
    return Drawn(tokens, base, joint, [log_z.lower.item(), log_z.upper.item()], effective_sample_size(neg_energies).item())


def _measure(args: argparse.Namespace, measured: Measured) -> dict:
    indices = [measured.indices[i] for i in spread(len(measured.indices), args.perplexity_sequences)]
    records = [
        measure_sequence(measured.model, measured.item(i), index=i, samples=args.samples, per_step=True, seed=args.seed)
        for i in tqdm(indices, desc="perplexity", unit="sequence", disable=None)
    ]
    return summarize(records, args.samples, per_step=True)


def _report(args: argparse.Namespace, measured: Measured, drawn: List[Drawn], perplexity: dict) -> dict:
    texts = {source: [each.tokens[source].tolist() for each in drawn] for source in SOURCES}
    log_probs = {
        model: {source: [getattr(each, model)[source] for each in drawn] for source in SOURCES} for model in ("base", "joint")
    }
    sizes = [each.sample_size for each in drawn]
    lower, upper = (sum(each.log_z[i] for each in drawn) / len(drawn) for i in (0, 1))
    settings = (
        "path", "energy_path", "gen_subset", "max_sequences", "energy_candidates", "perplexity", "batch_size", "seed", "dtype"
    )
    return {
        "conditions": measured.conditions,
        "sequences": len(drawn),
        "skipped": measured.skipped,
        "cut": measured.cut,
        **summarize_texts(texts, log_probs),
        "log_z": {"lower": lower, "upper": upper},
        "effective_sample_size": {"mean": sum(sizes) / len(sizes), "least": min(sizes)},
        "perplexity": perplexity,
        "settings": {name: getattr(args, name) for name in settings},
    }


def _write(args: argparse.Namespace, report: dict, drawn: List[Drawn], dictionary: Dictionary, measured: Measured) -> None:
    """report.json, and the texts line by line for `ab-export` or anything else."""
    prefixes = [measured.item(index)[: measured.model.prefix_length] for index in measured.indices]
    texts = {"prefixes": prefixes, **{source: [each.tokens[source] for each in drawn] for source in SOURCES}}
    write_text(os.path.join(args.output, "report.json"), json.dumps(report, indent=2))
    for name, rows in texts.items():
        lines = "".join(dictionary.string(row, args.post_process) + "\n" for row in rows)
        write_text(os.path.join(args.output, f"{name}.txt"), lines)


def _draw_figures(plots, folder: str, report: dict) -> None:
    plots.unique_ngrams(report["unique_ngrams"], os.path.join(folder, "unique_ngrams.png"))
    plots.log_probability_densities(report["log_probabilities"], os.path.join(folder, "log_probabilities.png"))
    perplexity = report["perplexity"]
    plots.estimates_by_samples(
        perplexity["joint"], perplexity["base"]["perplexity"], os.path.join(folder, "estimates_by_samples.png")
    )
    if "lower" in (perplexity.get("steps") or [{}])[0]:
        plots.gain_by_position(perplexity["steps"], os.path.join(folder, "gain_by_position.png"))


def _table(report: dict) -> str:
    size = report["effective_sample_size"]
    candidates = report["settings"]["energy_candidates"]
    lines = [
        report["conditions"],
        f"{report['sequences']} prefixes{cut_note(report['cut'])}; joint samples out of {candidates} candidates, "
        f"effective sample size {size['mean']:.1f} (least {size['least']:.1f})",
        "",
        f"{'':<14} {'distinct n-grams, %':>23}   {'log-probability, nats (minus data ± s.e.)'}",
        f"{'':<14} " + " ".join(f"{f'n = {n}':>7}" for n in ORDERS) + f"   {'base model':<28} joint model",
    ]
    for source in SOURCES:
        shares = report["unique_ngrams"][source].values()
        columns = " ".join(f"{'-' if share is None else f'{100 * share:.1f}':>7}" for share in shares)
        figures = [_figure(report["log_probabilities"][model][source]) for model in ("base", "joint")]
        name = source if source == "data" else f"{source} samples"
        lines.append(f"{name:<14} {columns}   {figures[0]:<28} {figures[1]}".rstrip())
    return "\n".join(lines)


def _figure(figures: dict) -> str:
    if "minus_data" not in figures:
        return f"{figures['mean']:.2f}"
    error = "" if figures["standard_error"] is None else f" ± {figures['standard_error']:.2f}"
    return f"{figures['mean']:.2f} ({figures['minus_data']:+.2f}{error})"
