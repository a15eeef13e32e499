"""fairseq-earm-analyse: a joint model's text and what people prefer (Deng et al. 2020, Section 4.3), cases, convergence."""
from __future__ import annotations

import argparse
import json
import os
from typing import List, Optional, Sequence

from fairseq_earm.cli import case_study, convergence, text_report
from fairseq_earm.cli.common import check_json, interruptible, write_json, write_text
from fairseq_earm.errors import UsageError
from fairseq_earm.evaluation.ab_page import choose_pairs, page_and_key
from fairseq_earm.evaluation.preference import binomial_p_value, is_key, preference
from fairseq_earm.evaluation.whole_file import is_device


@interruptible()
def main(argv: Optional[Sequence[str]] = None) -> None:
    """The console script."""
    args = _parser().parse_args(argv)
    args.run(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fairseq-earm-analyse", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")

    def add(name: str, help_text: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=help_text, description=help_text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )

    text_report.add_flags(add("report", "data beside samples of a base and its joint model, in numbers, figures and texts"))
    convergence.add_flags(add("convergence", "cross-entropy on training and test data by epoch, of several runs"))
    case_study.add_flags(add("cases", "single translations of several systems on a page, the energy of every token as a colour"))
    export = add("ab-export", "a page on which people choose between the texts of two systems, not knowing which is whose")
    export.add_argument("a", metavar="A.txt", help="texts of system A, the one hoped to be better, one a line")
    export.add_argument("b", metavar="B.txt", help="texts of system B, line by line after the same prefixes")
    export.add_argument("--prefixes", metavar="FILE", help="what both continue, shown above each pair")
    export.add_argument("--real", metavar="FILE", help="real text for the attention checks, line by line; by default system A's")
    export.add_argument("--output", required=True, metavar="page.html", help="the page to hand out; its key goes to page.key.json")
    export.add_argument("--items", type=int, default=100, metavar="N", help="pairs to choose between")
    export.add_argument(
        "--checks", type=int, default=10, metavar="N", help="attention checks among them: a text beside its shuffled words"
    )
    export.add_argument("--title", default="Which text is better?", help="heading of the page")
    export.add_argument("--seed", type=int, default=1, metavar="N", help="other seeds choose other lines and sides")
    export.set_defaults(run=export_page)
    test = add("ab-test", "votes for A and B, and the one-sided binomial test that A is preferred")
    test.add_argument("answers", nargs="+", metavar="answers.json", help="what raters downloaded from the page, a file each")
    test.add_argument("key", metavar="key.json", help="the page's key")
    test.add_argument(
        "--allowed-failures", type=int, default=0, metavar="N", help="attention checks that a rater may fail and still count",
    )
    test.add_argument("--json", metavar="FILE", help="also write the result there")
    test.set_defaults(run=count_votes)
    return parser


def export_page(args: argparse.Namespace) -> None:
    """Write the page and its key."""
    if args.items < 1 or args.checks < 0:
        raise UsageError(f"--items {args.items} --checks {args.checks}: give 1 item or more, and 0 checks or more")
    check_json(args.output, flag="--output")
    if is_device(args.output):
        raise UsageError(f"--output {args.output}: the page's key is written beside it; give a file")
    a, b = _lines(args.a), _lines(args.b)
    prefixes = _lines(args.prefixes) if args.prefixes else None
    real = _lines(args.real) if args.real else a
    pairs = choose_pairs(a, b, prefixes, real, items=args.items, checks=args.checks, seed=args.seed)
    page, key = page_and_key(pairs, args.title)
    key_path = os.path.splitext(args.output)[0] + ".key.json"
    write_text(args.output, page)
    write_text(key_path, json.dumps({**key, "systems": {"A": args.a, "B": args.b}, "seed": args.seed}, indent=1))
    contents = f"{args.items} pairs and {args.checks} attention checks"
    print(f"{args.output}: {contents}. {key_path} says which is whose: keep it to yourself.")


def count_votes(args: argparse.Namespace) -> None:
    """Count votes and print the test."""
    if len({os.path.realpath(path) for path in args.answers}) < len(args.answers):
        raise UsageError("one file of answers is given twice: every rater's votes count once")
    if args.allowed_failures < 0:
        raise UsageError(f"--allowed-failures {args.allowed_failures}: give 0 or more")
    key = _json(args.key)
    if not is_key(key):
        raise UsageError(f"{args.key} is no key of ab-export: give page.key.json as the last file")
    found = preference([_json(path) for path in args.answers], key, allowed_failures=args.allowed_failures)
    votes = found.wins_a + found.wins_b
    names = key["systems"] if isinstance(key.get("systems"), dict) else {}
    for system, wins in (("A", found.wins_a), ("B", found.wins_b)):
        share = f" ({wins / votes:.1%})" if votes else ""
        p_value = binomial_p_value(wins, votes)
        print(f"{system} {names.get(system, '')}: {wins} of {votes} votes{share}, one-sided p = {p_value:.4g}")
    excluded = f"; left out for failed attention checks: {', '.join(found.excluded)}" if found.excluded else ""
    print(f"{found.raters} raters{excluded}; {found.unanswered} pairs left open")
    if args.json:
        write_json(args.json, {**found._asdict(), "systems": names})


def _lines(path: str) -> List[str]:
    try:
        with open(path, encoding="utf-8", newline="\n") as file:
            return [line.rstrip("\r\n") for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None


def _json(path: str) -> dict:
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UsageError(f"{path} is not JSON: give what the page's button downloaded, and the key as the last file") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds no answers: give what the page's button downloaded, and the key as the last file")
    return content
