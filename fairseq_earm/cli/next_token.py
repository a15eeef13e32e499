"""fairseq-earm-next: how likely the next token is under a base model and under its joint model with an energy.

The joint model gives probabilities to whole sequences; that of a next token is a mean over all the ways in which the
sequence may go on (Deng et al. 2020, Appendix A.1), estimated here from the base's own continuations of every token.
"""
from __future__ import annotations

import argparse
from typing import List, NamedTuple, Optional, Sequence

import torch
from fairseq.data import Dictionary
from torch import Tensor
from tqdm import tqdm

from fairseq_earm.cli.common import (
    check_json, check_seed, device, dtype, interruptible, text_dictionary, text_task, write_json,
)
from fairseq_earm.ebm.marginal import next_token
from fairseq_earm.errors import UsageError, one_line
from fairseq_earm.joint_generation import DEFAULT_TOKENS, chunk_of, draw_candidates, finite
from fairseq_earm.models.load_energy import load_energy, report_other_base
from fairseq_earm.sampling.base_lm import load_base_lm
from fairseq_earm.sampling.continuation import ContinuationSampler
from fairseq_earm.sampling.draw import without_padding
from fairseq_earm.sampling.scoring import decoder_input, last_logits
from fairseq_earm.sampling.store_settings import DTYPES


class NextTokens(NamedTuple):
    """The base's K likeliest next tokens, likeliest first.

    Attributes:
        tokens: (K,).
        base: (K,) their probability under the base, out of all tokens.
        joint: (K,) under the joint model, out of these K.
        standard_error: (K,) of `joint`; 0 for the last token of a sequence, where nothing is estimated.
    """

    tokens: Tensor
    base: Tensor
    joint: Tensor
    standard_error: Tensor


@torch.no_grad()
def next_tokens(
    base, energy, prefix: Tensor, *, top_k: int, rest: int, samples: int, chunk: int = 64,
    generator: Optional[torch.Generator] = None, progress: bool = False,
) -> NextTokens:
    """Next-token probabilities of base and joint model.

    Args:
        base: a fairseq language model in eval mode.
        energy: a network (R, L) tokens → (R,) energies in eval mode.
        prefix: (t,) tokens, everything before the next token.
        rest: tokens of the sequence that come after the next one; 0 makes the joint model's probabilities exact.
        samples: continuations drawn behind each of the `top_k` tokens, each a different set.
        chunk: most sequences in one pass.
    Raises:
        UsageError: an energy that is not finite.
    """
    dictionary = base.decoder.dictionary
    read = decoder_input(prefix.unsqueeze(0), dictionary.eos(), extra_step=True)
    logits = last_logits(base.decoder, read)[0]
    log_probs, tokens = without_padding(logits, dictionary.pad()).double().log_softmax(-1).topk(top_k)
    rows = torch.cat([prefix.expand(top_k, -1), tokens.unsqueeze(1)], 1)
    if rest == 0:
        neg_energies = -finite(energy(rows)).unsqueeze(1)
    else:
        sampler = ContinuationSampler(dictionary, rest)
        bar = tqdm(rows.split(1), desc="next tokens", unit="token", disable=None if progress else True)
        drawn = [draw_candidates(base, energy, sampler, row, samples, chunk=chunk, generator=generator) for row in bar]
        neg_energies = torch.cat([candidates.neg_energies for candidates in drawn])
    joint = next_token(log_probs, neg_energies)
    return NextTokens(tokens, log_probs.exp(), joint.probability, joint.standard_error)


@interruptible()
def main(argv: Optional[Sequence[str]] = None) -> None:
    """The console script; prints a table."""
    args = _parser().parse_args(argv)
    dictionary = _dictionary(args)
    data = text_task(dictionary, args.data)
    energy = load_energy(args.energy_path, data, dtype=dtype(args))
    report_other_base(energy, args.energy_path, args.path)
    prefix = dictionary.encode_line(args.prefix, add_if_not_exist=False, append_eos=False).long()
    rest = _rest(args, energy, len(prefix))
    length = len(prefix) + 1 + rest
    base = load_base_lm(args.path, data, flag="--path", sequence_length=length, dtype=dtype(args))
    found = next_tokens(
        base.to(device(args)).model, energy.to(device(args)).model, prefix.to(device(args)), top_k=args.top_k, rest=rest,
        samples=args.samples, chunk=chunk_of(length, args.max_tokens), progress=True,
        generator=torch.Generator(device(args)).manual_seed(args.seed),
    )
    report = _report(args, dictionary, prefix, rest, found)
    print(_table(report))
    if args.json:
        write_json(args.json, report)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fairseq-earm-next", description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("data", help="folder of fairseq-preprocess, for its dictionary")
    parser.add_argument("--path", required=True, metavar="FILE", help="checkpoint of the base, a language model")
    parser.add_argument("--energy-path", required=True, metavar="FILE", help="checkpoint of the energy network")
    parser.add_argument(
        "--prefix", required=True, metavar="WORDS",
        help="what comes before the next token, tokenized as the data was; </s> ends a sentence. Up to the length of the prefixes "
        "that the energy was trained with it is a prefix, what it has beyond that is the beginning of a continuation",
    )
    parser.add_argument("--top-k", type=int, default=10, metavar="K", help="how many of the base's likeliest tokens to compare")
    parser.add_argument("--samples", type=int, default=1000, metavar="N", help="continuations drawn behind each of them")
    parser.add_argument("--max-tokens", type=int, default=DEFAULT_TOKENS, metavar="N", help="tokens in one pass")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="other seeds draw other continuations")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="precision of the models' parameters")
    parser.add_argument("--cpu", action="store_true", help="use no GPU")
    parser.add_argument("--json", metavar="FILE", help="also write the table there")
    return parser


def _dictionary(args: argparse.Namespace) -> Dictionary:
    dictionary = text_dictionary(args.data)
    if not 2 <= args.top_k < len(dictionary):
        raise UsageError(f"--top-k {args.top_k}: give 2 to {len(dictionary) - 1}, all symbols of the dictionary but padding")
    if args.samples < 2:
        raise UsageError(f"--samples {args.samples} gives no standard error: give 2 or more, 1000 as a rule")
    check_seed(args.seed)
    check_json(args.json)
    if args.max_tokens < 1:
        raise UsageError(f"--max-tokens {args.max_tokens}: give 1 or more")
    return dictionary


def _rest(args: argparse.Namespace, energy, given: int) -> int:
    """Tokens behind the next one: of the continuation that the energy was trained on, after a prefix of at most its length."""
    trained = energy.task.cfg
    if not hasattr(trained, "prefix_length"):
        raise UsageError(
            f"--energy-path {args.energy_path} is an energy of sentence pairs: give one of residual_language_modeling"
        )
    rest = trained.sequence_length - max(given, trained.prefix_length) - 1
    if rest < 0:
        raise UsageError(
            f"--prefix has {given} tokens, and the energy was trained on sequences of {trained.sequence_length}: shorten it to "
            f"{trained.sequence_length - 1} or fewer"
        )
    return rest


def _report(args: argparse.Namespace, dictionary: Dictionary, prefix: Tensor, rest: int, found: NextTokens) -> dict:
    share = found.base.sum()
    rows = [
        {"token": dictionary[token], "base": base, "base_of_k": base / share.item(), "joint_of_k": joint, "standard_error": error}
        for token, base, joint, error in zip(*(values.tolist() for values in found))
    ]
    return {
        "prefix": " ".join(dictionary[token] for token in prefix.tolist()),
        "rest": rest,
        "samples": args.samples if rest else 0,
        "seed": args.seed,
        "base_share_of_k": share.item(),
        "tokens": rows,
    }


def _table(report: dict) -> str:
    rows: List[dict] = [{**row, "token": one_line(row["token"])} for row in report["tokens"]]
    width = max(5, *(len(row["token"]) for row in rows))
    how = "exact: the sequence ends here"
    if report["rest"]:
        how = f"from {report['samples']} continuations of {report['rest']} tokens each"
    share = f"{report['base_share_of_k']:.1%} of the base's probability"
    lines = [
        f"after: {one_line(report['prefix'])}",
        f"joint: {how}. Both columns are out of these {len(rows)} tokens, {share}.",
        "",
        f"{'token':<{width}} {'base':>8} {'joint':>8} {'± s.e.':>8} {'joint/base':>11}",
    ]
    for row in rows:
        ratio = row["joint_of_k"] / row["base_of_k"]
        lines.append(
            f"{row['token']:<{width}} {row['base_of_k']:8.4f} {row['joint_of_k']:8.4f} {row['standard_error']:8.4f} {ratio:11.3f}"
        )
    return "\n".join(lines)
