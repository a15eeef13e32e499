"""fairseq-earm-evaluate: BLEU, ROUGE and METEOR of systems with several seeds, BLEU by target length, paired bootstrap.

A system is what fairseq-generate printed, a file for each seed, or plain text of any other program.
"""
from __future__ import annotations

import argparse
import os
import statistics
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence

import numpy as np
from sacrebleu.metrics import BLEU
from tqdm import tqdm

from fairseq_earm.cli.common import check_json, check_seed, interruptible, write_json, write_text
from fairseq_earm.cli.evaluated_texts import Texts, read_texts
from fairseq_earm.errors import UsageError
from fairseq_earm.evaluation.score_tables import Table, latex_comment, latex_table, mean_and_spread, text_table
from fairseq_earm.evaluation.significance import SACREBLEU_SEED, paired_bootstrap
from fairseq_earm.evaluation.text_scores import Bleu, Meteor, Rouge, bleu_statistics, corpus_bleu

METRICS = ("bleu", "rouge", "meteor")


class Scored(NamedTuple):
    """Statistics of every sentence, from which scores of all or some of them follow.

    Attributes:
        rows: name of a score → name of a system → for each seed (S, K) statistics.
        score: name of a score → function from their sum over sentences, (K,), to the score, of 100.
        signatures: of the metrics.
    """

    rows: Dict[str, Dict[str, List[np.ndarray]]]
    score: Dict[str, Callable[[np.ndarray], float]]
    signatures: List[str]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fairseq-earm-evaluate", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--system", nargs="+", action="append", required=True, metavar=("NAME", "FILE"),
        help="a system's name and its files, one for each seed: what fairseq-generate printed, or plain text, a sentence a line; "
        "once for each system",
    )
    parser.add_argument(
        "--references", nargs="+", metavar="FILE",
        help="one or several reference translations, a sentence a line, scored as they are; without it the T-lines",
    )
    parser.add_argument("--against", metavar="NAME", help="system that the others are compared with (default: the first)")
    parser.add_argument("--metrics", nargs="+", choices=METRICS, default=METRICS, help="what to compute (default: all)")
    parser.add_argument(
        "--bins", nargs="+", type=int, default=[25, 50], metavar="N",
        help="where the bins of BLEU by target length begin, in tokens of BLEU of the (first) reference (default: 25 50)",
    )
    parser.add_argument(
        "--tokenize", choices=sorted(BLEU.TOKENIZERS),
        help="tokenizer of sacreBLEU, also METEOR's (default: none if the references look tokenised, else 13a)",
    )
    parser.add_argument("--lowercase", action="store_true", help="BLEU of text in lower case; ROUGE and METEOR always are")
    parser.add_argument(
        "--detokenize", metavar="LANG", help="take Moses' tokenisation of this language off translations and T-lines (sacremoses)"
    )
    parser.add_argument("--resamples", type=int, default=1000, metavar="N", help="bootstrap resamples (default: 1000)")
    parser.add_argument(
        "--seed", type=int, default=SACREBLEU_SEED, metavar="N", help="seed of the bootstrap (default: sacreBLEU's %(default)s)"
    )
    parser.add_argument("--latex", metavar="FILE", help="also write the tables there, as plain tabulars")
    parser.add_argument("--json", metavar="FILE", help="also write the results there, those of every seed among them")
    return parser


@interruptible()
def main(argv: Optional[Sequence[str]] = None) -> None:
    """The console script; prints the tables, the metrics' signatures and what a reader of them should know."""
    args = _parser().parse_args(argv)
    _check_flags(args)
    texts = read_texts(args)
    scored = _score(args, texts)
    report = _report(args, texts, scored)
    shown = tables(report)
    footer = "\n".join([_how(report), *report["signatures"], *(f"Note: {note}" for note in report["notes"])])
    print("\n\n".join([*map(text_table, shown), footer]))
    if args.latex:
        latex = "\n\n".join([*map(latex_table, shown), latex_comment(footer)])
        write_text(args.latex, latex + "\n", flag="--latex")
    if args.json:
        write_json(args.json, report)


def _check_flags(args: argparse.Namespace) -> None:
    names = [name for name, *_ in args.system]
    args.against = args.against or names[0]
    for name, *files in args.system:
        if not files:
            raise UsageError(f"--system {name} names no file: give a name and then files, --system NAME FILE [FILE ...]")
        if names.count(name) > 1:
            raise UsageError(f"--system {name} is given twice: give the files of all its seeds at once, or another name")
        if len({os.path.realpath(path) for path in files}) < len(files):
            raise UsageError(f"--system {name} names a file twice: give a file for each seed")
    if args.against not in names:
        raise UsageError(f"--against {args.against} is no --system: give one of {', '.join(names)}")
    if args.bins != sorted(set(args.bins)) or args.bins[0] < 1:
        raise UsageError(f"--bins {' '.join(map(str, args.bins))}: give lengths of 1 or more in ascending order, as 25 50")
    if args.resamples < 1:
        raise UsageError(f"--resamples {args.resamples} gives no interval: give 1 or more, 1000 as a rule")
    check_seed(args.seed)
    check_json(args.latex, flag="--latex")
    check_json(args.json)
    try:
        BLEU(tokenize=args.tokenize)
    except (ImportError, RuntimeError, OSError) as error:
        raise UsageError(f"--tokenize {args.tokenize} cannot be used: {' '.join(str(error).split())}") from None


def _score(args: argparse.Namespace, texts: Texts) -> Scored:
    build = {
        "bleu": lambda: Bleu(texts.references, texts.tokenizer, lowercase=args.lowercase),
        "rouge": lambda: Rouge(texts.references),
        "meteor": lambda: Meteor(texts.references, texts.tokenizer),
    }
    metrics = [build[name]() for name in METRICS if name in args.metrics]
    rows: Dict[str, Dict[str, List[np.ndarray]]] = {}
    score = {}
    work = [(metric, name, own) for metric in metrics for name, seeds in texts.systems.items() for own in seeds]
    for metric, system, own in tqdm(work, desc="scores", unit="file", disable=None):
        for name, statistics_ in metric.statistics(own).items():
            rows.setdefault(name, {}).setdefault(system, []).append(statistics_)
            score[name] = metric.score
    return Scored(rows, score, [metric.signature() for metric in metrics])


def _report(args: argparse.Namespace, texts: Texts, scored: Scored) -> dict:
    """All results; what --json writes."""
    systems = {}
    for system, *files in args.system:
        scores = {
            name: _over_seeds([scored.score[name](rows.sum(0)) for rows in by_system[system]])
            for name, by_system in scored.rows.items()
        }
        systems[system] = {"files": files, "scores": scores}
    report = {
        "sentences": len(texts.references[0]),
        "references": args.references or "T-lines",
        "systems": systems,
        "signatures": scored.signatures,
        "notes": texts.notes,
    }
    if "BLEU" in scored.rows:
        report["bleu_by_length"] = _by_length(args.bins, texts, scored.rows["BLEU"])
    if len(systems) > 1:
        report["bootstrap"] = {
            "against": args.against, "resamples": args.resamples, "seed": args.seed, "differences": _differences(args, scored)
        }
    return report


def _over_seeds(values: Sequence[float]) -> dict:
    """Mean and sample standard deviation (None of one value) over seeds, and the values themselves."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "standard_deviation": deviation, "seeds": list(values)}


def _by_length(starts: Sequence[int], texts: Texts, rows: Dict[str, List[np.ndarray]]) -> List[dict]:
    """Corpus BLEU of the sentences of each bin [low, high) of the first reference's length; None of none."""
    first = texts.references[0]
    lengths = bleu_statistics(first, [first], texts.tokenizer)[:, 1]
    bins = []
    for low, high in zip([0, *starts], [*starts, None]):
        chosen = (lengths >= low) & (lengths < (np.inf if high is None else high))
        bleu = {
            system: _over_seeds([corpus_bleu(own[chosen].sum(0)) for own in seeds]) if chosen.any() else None
            for system, seeds in rows.items()
        }
        bins.append({"low": low, "high": high, "sentences": int(chosen.sum()), "bleu": bleu})
    return bins


def _differences(args: argparse.Namespace, scored: Scored) -> Dict[str, Dict[str, dict]]:
    """System → name of a score → difference to --against, its 95 % interval and p."""
    found: Dict[str, Dict[str, dict]] = {name: {} for name, *_ in args.system if name != args.against}
    work = [(system, name) for system in found for name in scored.rows]
    for system, name in tqdm(work, desc="bootstrap", unit="test", disable=None):
        rows = scored.rows[name]
        difference = paired_bootstrap(
            rows[system], rows[args.against], scored.score[name], resamples=args.resamples, seed=args.seed
        )
        found[system][name] = difference._asdict()
    return found


def tables(report: dict) -> List[Table]:
    """The tables of what --json writes."""
    systems = report["systems"]
    names = list(next(iter(systems.values()))["scores"])
    rows = [
        [system, str(len(own["files"])), *(_over_seeds_cell(own["scores"][name]) for name in names)]
        for system, own in systems.items()
    ]
    found = [Table("Scores of 100, mean ± standard deviation over seeds", ["system", "seeds", *names], rows)]
    bins = report.get("bleu_by_length")
    if bins:
        counts = ["sentences", *(str(each["sentences"]) for each in bins)]
        rows = [[system, *(_over_seeds_cell(each["bleu"][system]) for each in bins)] for system in systems]
        header = ["target length", *(f"[{each['low']}, {'∞' if each['high'] is None else each['high']})" for each in bins)]
        found.append(Table("BLEU by target length, in tokens", header, [counts, *rows]))
    bootstrap = report.get("bootstrap")
    if bootstrap:
        rows = [
            [system, name, f"{one['difference']:+.2f}", f"[{one['low']:+.2f}, {one['high']:+.2f}]",
             _p_value(one["p_value"]), _p_value(one["sacrebleu_p_value"]) if one["difference"] else "-"]
            for system, scores in bootstrap["differences"].items() for name, one in scores.items()
        ]
        title = f"Differences to {bootstrap['against']}, paired bootstrap over sentences"
        found.append(Table(title, ["system", "score", "difference", "95 % interval", "p", "sacreBLEU's p"], rows))
    return found


def _over_seeds_cell(found: Optional[dict]) -> str:
    return mean_and_spread(found["seeds"] if found else [])


def _p_value(p_value: float) -> str:
    return f"{p_value:.3f}" if p_value >= 0.001 else f"{p_value:.1g}"


def _how(report: dict) -> str:
    """The lines under the tables: how many sentences against what, and what a difference means."""
    references = report["references"]
    against = references if isinstance(references, str) else f"{len(references)} reference{'s' * (len(references) > 1)}"
    lines = [f"{report['sentences']} sentences against {against}"]
    bootstrap = report.get("bootstrap")
    if bootstrap:
        lines.append(
            f"Differences are of means over seeds; interval and p come from {bootstrap['resamples']} resamples of the sentences "
            f"(seed {bootstrap['seed']}) and tell about other sentences, the ± about other seeds. p is two-sided; sacreBLEU's p, "
            "of --paired-bs, is about half of it"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
