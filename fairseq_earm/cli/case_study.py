"""fairseq-earm-analyse cases: single translations of several systems, the energy of every token as a colour (Table 12)."""
from __future__ import annotations

import argparse
import random
from typing import Dict, List, Sequence, Tuple

from fairseq.data.data_utils import post_process
from tqdm import tqdm

from fairseq_earm.cli.common import POST_PROCESS, check_json, device, write_text
from fairseq_earm.errors import UsageError
from fairseq_earm.evaluation.case_page import Case, Piece, Translation, case_page, disagreement
from fairseq_earm.evaluation.generated import is_generated, read_generated, text_lines
from fairseq_earm.evaluation.translate import Translator, fitting, open_translators
from fairseq_earm.sampling.scoring import check_post_step

# Sentences translated for each one shown, where those are shown that the systems differ on.
POOL = 10


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this command."""
    parser.add_argument("data", help="folder of fairseq-preprocess, pairs of sentences")
    parser.add_argument(
        "--model", nargs=2, action="append", required=True, metavar=("NAME", "CHECKPOINT"), dest="models",
        help="a translation model; give it again for every further one",
    )
    parser.add_argument(
        "--system", nargs=2, action="append", default=[], metavar=("NAME", "FILE"), dest="systems",
        help="translations of the whole split by whatever made them: output of fairseq-generate, or a line a sentence",
    )
    parser.add_argument("--output", required=True, metavar="FILE.html", help="the page")
    parser.add_argument("--gen-subset", default="test", metavar="SPLIT", help="split that the sentences are from")
    parser.add_argument("--sentences", type=int, default=10, metavar="N", help="sentences on the page")
    parser.add_argument(
        "--choose", choices=["differing", "random"], default="differing",
        help=f"differing: of {POOL} times as many drawn at random, those that systems differ on the most; random: without a look",
    )
    parser.add_argument("--ids", type=int, nargs="+", metavar="I", help="these sentences, by number from 0, and no choice")
    parser.add_argument("--beam", type=int, default=5, metavar="N", help="of the search for translations")
    parser.add_argument(
        "--energy-step", choices=["last", "post"], default="last",
        help="as the models were trained; post: also the step after end-of-sentence",
    )
    parser.add_argument(
        "--post-process", "--remove-bpe", nargs="?", const="@@ ", default=None, choices=POST_PROCESS, metavar="SYMBOL",
        help="join the pieces of words, as fairseq-generate does with this flag; each piece keeps its own colour",
    )
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="sentences at once")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="other seeds draw other sentences")
    parser.add_argument("--title", default="Translations and their energies", help="heading of the page")
    parser.add_argument("--cpu", action="store_true", help="use no GPU")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Translate and write the page."""
    _check_flags(args)
    texts = {name: _read(path, args.post_process) for name, path in args.systems}
    flags = [(f"--model {name}", path) for name, path in args.models]
    opened = open_translators(flags, args.data, args.gen_subset, device=device(args))
    translators = {name: translator for (name, _), translator in zip(args.models, opened)}
    _check_sizes(args, texts, opened[0])
    indices = _candidates(args, opened)
    tokens = _translate(args, translators, indices)
    joined = {name: {i: _join(translators[name], rows[i], args.post_process) for i in indices} for name, rows in tokens.items()}
    shown = _shown(args, indices, joined, texts)
    cases = _cases(args, shown, translators, tokens, joined, texts)
    origins = dict([*args.models, *args.systems])
    write_text(args.output, case_page(cases, title=args.title, chosen=_chosen(args, indices, shown), origins=origins))
    print(f"{args.output}: {len(cases)} sentences of {args.gen_subset}")


def _check_flags(args: argparse.Namespace) -> None:
    """Refuse what needs no model to be seen as wrong."""
    for name in ("sentences", "beam", "batch_size"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)}: give 1 or more")
    names = [name for name, _ in [*args.models, *args.systems]]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UsageError(f"--model or --system {twice[0]}: two systems have this name; give each its own")
    check_json(args.output, flag="--output")


def _read(path: str, symbol: str) -> List[str]:
    lines = read_generated(path).hypotheses if is_generated(text_lines(path)) else text_lines(path)
    return [post_process(line, symbol) for line in lines]


def _check_sizes(args: argparse.Namespace, texts: Dict[str, List[str]], translator: Translator) -> None:
    size = len(translator.dataset)
    for name, path in args.systems:
        if len(texts[name]) != size:
            raise UsageError(
                f"--system {name} {path} has {len(texts[name])} sentences, and {args.gen_subset} of {args.data} has {size}: give "
                "translations of all of it, in its order"
            )
    wrong = [index for index in args.ids or [] if not 0 <= index < size]
    if wrong:
        raise UsageError(f"--ids {wrong[0]}: {args.gen_subset} has sentences 0 to {size - 1}")


def _candidates(args: argparse.Namespace, translators: Sequence[Translator]) -> List[int]:
    """Numbers of the sentences that are translated."""
    usable = fitting(translators)
    if args.ids:
        too_long = sorted({*args.ids} - {*usable})
        if too_long:
            raise UsageError(f"--ids {too_long[0]}: this sentence is longer than a model has positions for; leave it out")
        return sorted({*args.ids})
    wanted = args.sentences * (POOL if _compares(args) else 1)
    return sorted(random.Random(args.seed).sample(usable, min(wanted, len(usable))))


def _compares(args: argparse.Namespace) -> bool:
    """Whether sentences are chosen by their translations."""
    return not args.ids and args.choose == "differing" and len(args.models) + len(args.systems) > 1


def _translate(
    args: argparse.Namespace, translators: Dict[str, Translator], indices: Sequence[int]
) -> Dict[str, Dict[int, List[int]]]:
    """Model → number → tokens of its translation."""
    found: Dict[str, Dict[int, List[int]]] = {name: {} for name in translators}
    with tqdm(desc="translations", total=len(indices) * len(translators), unit="sentence", disable=None) as progress:
        for name, translator in translators.items():
            by_length = sorted(indices, key=lambda index: int(translator.dataset.src_sizes[index]))
            for at in range(0, len(by_length), args.batch_size):
                batch = by_length[at : at + args.batch_size]
                found[name].update(zip(batch, translator.translate(batch, beam=args.beam)))
                progress.update(len(batch))
    return found


def _join(translator: Translator, tokens: Sequence[int], symbol: str) -> List[str]:
    return added_texts([translator.task.target_dictionary[token] for token in tokens], symbol)


def added_texts(symbols: Sequence[str], symbol: str) -> List[str]:
    """What each piece adds to a text, with the space before it; in a row they are the text, its pieces joined to words."""
    added, text = [], ""
    for count in range(1, len(symbols) + 1):
        longer = post_process(" ".join(symbols[:count]), symbol)
        added.append(longer[len(text):])
        text = longer
    return added


def _shown(args: argparse.Namespace, indices: Sequence[int], joined: dict, texts: Dict[str, List[str]]) -> List[int]:
    """Those of the translated sentences that go on the page."""
    if not _compares(args):
        return list(indices)

    def differ(index: int) -> float:
        return disagreement([*("".join(rows[index]) for rows in joined.values()), *(lines[index] for lines in texts.values())])

    return sorted(sorted(indices, key=differ, reverse=True)[: args.sentences])


def _chosen(args: argparse.Namespace, indices: Sequence[int], shown: Sequence[int]) -> str:
    """How the sentences were chosen."""
    where = f"sentences of {args.gen_subset}, numbered from 0"
    if args.ids:
        return f"{len(shown)} {where}, chosen by hand (--ids)."
    if _compares(args):
        return (
            f"Out of {len(indices)} {where}, drawn at random (seed {args.seed}), the {len(shown)} on which the systems differ the "
            "most from each other in their words: they show what differs, not how often."
        )
    return f"{len(shown)} {where}, drawn at random (seed {args.seed})."


def _cases(args: argparse.Namespace, shown: Sequence[int], translators, tokens, joined, texts) -> List[Case]:
    pieces = {name: _pieces(args, translator, tokens[name], joined[name], shown) for name, translator in translators.items()}
    first = next(iter(translators.values()))
    cases = []
    for index in shown:
        own = [Translation(name, "".join(joined[name][index]), pieces[name][index]) for name in translators]
        others = [Translation(name, lines[index]) for name, lines in texts.items()]
        source, reference = _text(first, index, args.post_process)
        cases.append(Case(index, source, reference, [*own, *others]))
    return cases


def _text(translator: Translator, index: int, symbol: str) -> Tuple[str, str]:
    """Source and reference of a pair."""
    task = translator.task
    source = [task.source_dictionary[token] for token in translator.source(index)]
    reference = [task.target_dictionary[token] for token in translator.reference(index)]
    return post_process(" ".join(source), symbol), post_process(" ".join(reference), symbol)


def _pieces(
    args: argparse.Namespace, translator: Translator, tokens: dict, joined: dict, shown: Sequence[int]
) -> Dict[int, List[Piece]]:
    """Number → the translation's tokens with their energies, end-of-sentence last, or the step after it."""
    dictionary = translator.task.target_dictionary
    eos = dictionary.eos()
    ends = [eos, eos] if args.energy_step == "post" else [eos]
    rows = [[*tokens[index], *ends] for index in shown]
    if args.energy_step == "post":
        check_post_step(translator.model.decoder, max(map(len, rows)))
    found = {}
    for index, row, scores in zip(shown, rows, translator.score(shown, rows, rows)):
        added = [*joined[index], *([""] * len(ends))]
        names = [text.strip() or dictionary[token] for text, token in zip(added, row)]
        log_q = scores.log_prob.tolist()
        if args.energy_step == "post":
            names[-1], log_q[-1] = "after it", None
        found[index] = [Piece(*piece) for piece in zip(added, (-scores.logsumexp).tolist(), log_q, names)]
    return found
