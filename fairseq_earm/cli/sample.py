"""fairseq-earm-sample: pre-generate a language model's continuations of each prefix of a text, the negatives of residual NCE.

With `--output FILE.png` it draws images instead, see `sample_images`.

Start the same command again after it was killed: it goes on where it stopped, and what it writes is, byte for byte, what one
run would have written (on the same machine; on a GPU as far as torch's kernels repeat themselves).
"""
from __future__ import annotations

import argparse
import os
import sys
from typing import Callable, Optional, Sequence

import numpy as np
import torch
from fairseq.data import Dictionary
from fairseq.data.indexed_dataset import get_available_dataset_impl
from torch import Tensor
from tqdm import tqdm

from fairseq_earm.cli import sample_images
from fairseq_earm.cli.common import device, dtype, interruptible, text_dictionary, text_task
from fairseq_earm.errors import UsageError
from fairseq_earm.sampling.base_lm import load_base_lm
from fairseq_earm.sampling.blocks import Blocks, cut_note, load_blocks
from fairseq_earm.sampling.continuation import ContinuationSampler
from fairseq_earm.sampling.frozen import file_hash
from fairseq_earm.sampling.store_settings import BREAK_MODES, DTYPES, SETTINGS, dictionary_hash, shard_sequences
from fairseq_earm.sampling.store_writer import StoreWriter

Draw = Callable[[Tensor, int], Tensor]


@interruptible(", and samples of text go on where they stopped")
def main(argv: Optional[Sequence[str]] = None) -> None:
    """The console script; says what there was to do and what was done."""
    argv = sys.argv[1:] if argv is None else argv
    if sample_images.wants_images(argv):
        return sample_images.main(argv)
    args = _parser().parse_args(argv)
    _check_flags(args)
    dictionary = _dictionary(args)
    blocks = load_blocks(
        os.path.join(args.data, args.gen_subset), dictionary, sequence_length=args.sequence_length,
        break_mode=args.sample_break_mode, dataset_impl=args.dataset_impl, combine=args.gen_subset == "train",
    )
    settings = _settings(args, blocks, dictionary)
    writer = StoreWriter(
        os.path.join(args.output, args.gen_subset), settings, checkpoint=args.path, dictionary_size=len(dictionary)
    )
    if writer.finished:
        writer.remove_parts()
        print(f"{writer.prefix} is finished already: nothing to do")
        return
    # Loaded before anything is written: a model that will not do leaves nothing behind.
    model = _model(args, dictionary) if writer.missing() else None
    with writer:
        _draw_missing(writer, blocks, _continue(args, model, dictionary))
        writer.finish()
    prefixes = len(shard_sequences(settings))
    skipped = f"{blocks.skipped:,} shorter sequences skipped{cut_note(int(blocks.cut.sum()))}"
    print(f"{writer.prefix}: {args.samples} samples for each of {prefixes:,} prefixes; {skipped}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fairseq-earm-sample", description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("data", help="folder of fairseq-preprocess")
    parser.add_argument("--path", required=True, metavar="FILE", help="checkpoint of the language model")
    parser.add_argument(
        "--output", required=True, metavar="FOLDER",
        help="where the samples go, for --negatives in training; one for all splits. FILE.png: draw images, see --output FILE.png --help",
    )
    parser.add_argument("--gen-subset", default="train", metavar="SPLIT", help="split whose prefixes are continued")
    parser.add_argument("--prefix-length", type=int, default=120, metavar="N", help="tokens that are given")
    parser.add_argument("--sequence-length", type=int, default=160, metavar="N", help="tokens of a sequence, prefix included")
    parser.add_argument("--sample-break-mode", choices=BREAK_MODES, default="none", help="as in task residual_language_modeling")
    parser.add_argument(
        "--dataset-impl", choices=get_available_dataset_impl(), metavar="FORMAT",
        help="format of the data, if fairseq does not recognise it",
    )
    parser.add_argument("--samples", type=int, default=16, metavar="N", help="continuations of each prefix")
    parser.add_argument(
        "--temperature", type=float, default=1.0, metavar="T",
        help="logits are divided by it; the residual of the base itself takes 1 here and -1 in the next two",
    )
    parser.add_argument("--sampling-topk", type=int, default=-1, metavar="K", help="draw among the K likeliest tokens; -1: all")
    parser.add_argument(
        "--sampling-topp", type=float, default=-1.0, metavar="P",
        help="draw from the smallest set of tokens with probability P (nucleus); -1: all",
    )
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="other seeds draw other samples")
    parser.add_argument(
        "--batch-size", type=int, default=16, metavar="N",
        help="prefixes in a batch, which has so many times --samples rows; also what is lost at most when the command is killed",
    )
    parser.add_argument("--num-shards", type=int, default=1, metavar="N", help="divide the prefixes into so many parts")
    parser.add_argument("--shard-id", type=int, default=0, metavar="I", help="the part that this command does, from 0")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="precision of the model's parameters")
    parser.add_argument("--cpu", action="store_true", help="use no GPU")
    return parser


def _check_flags(args: argparse.Namespace) -> None:
    for name, field in SETTINGS.items():
        if hasattr(args, name) and not field.allowed(getattr(args, name)):
            raise UsageError(f"{field.flag} {getattr(args, name)}: give {field.description}")
    if args.prefix_length >= args.sequence_length:
        raise UsageError(
            f"--prefix-length {args.prefix_length} leaves nothing to continue of --sequence-length {args.sequence_length}: give a "
            "shorter prefix, or longer sequences"
        )
    if args.shard_id >= args.num_shards:
        raise UsageError(f"--shard-id {args.shard_id}: with --num-shards {args.num_shards} give 0 to {args.num_shards - 1}")
    if args.sampling_topk != -1 and args.sampling_topp != -1:
        raise UsageError(f"--sampling-topk {args.sampling_topk} and --sampling-topp {args.sampling_topp}: give one of them")


def _dictionary(args: argparse.Namespace) -> Dictionary:
    dictionary = text_dictionary(args.data)
    if args.sampling_topk > len(dictionary):
        raise UsageError(f"--sampling-topk {args.sampling_topk}: the dictionary has {len(dictionary)} symbols; give fewer, or -1")
    return dictionary


def _settings(args: argparse.Namespace, blocks: Blocks, dictionary: Dictionary) -> dict:
    settings = {
        **{name: getattr(args, name) for name in SETTINGS if hasattr(args, name)},
        "split": args.gen_subset,
        "dictionary_sha256": dictionary_hash(dictionary),
        "sequences": len(blocks),
        "text_sha256": blocks.fingerprint(),
        "checkpoint_sha256": file_hash(args.path, flag="--path"),
        "device": device(args).type,
    }
    chunks = -(-len(blocks) // args.batch_size)
    if args.num_shards > chunks:
        raise UsageError(
            f"--num-shards {args.num_shards}: {len(blocks)} sequences are {chunks} batches of --batch-size {args.batch_size}; give "
            "fewer shards, or smaller batches"
        )
    return settings


def _model(args: argparse.Namespace, dictionary: Dictionary):
    data = text_task(dictionary, args.data)
    base = load_base_lm(args.path, data, flag="--path", sequence_length=args.sequence_length, dtype=dtype(args))
    return base.to(device(args)).model


def _continue(args: argparse.Namespace, model, dictionary: Dictionary) -> Draw:
    """A function (prefixes (B, P), number of the first) → (B · N, T) tokens, with random numbers of each batch's own."""
    sampler = ContinuationSampler(
        dictionary, args.sequence_length - args.prefix_length,
        temperature=args.temperature, topk=args.sampling_topk, topp=args.sampling_topp,
    )

    def draw(prefixes: Tensor, first: int) -> Tensor:
        generator = torch.Generator(device(args)).manual_seed(_seed(args.seed, first))
        try:
            return sampler(model, prefixes.to(device(args)), args.samples, generator=generator).tokens
        except torch.cuda.OutOfMemoryError:
            raise UsageError(
                f"--batch-size {args.batch_size}: {args.batch_size} times --samples {args.samples} rows do not fit on the GPU; "
                "give a smaller one"
            ) from None

    return draw


def _draw_missing(writer: StoreWriter, blocks: Blocks, draw: Draw) -> None:
    """Draw and keep every chunk that is not there yet."""
    settings, missing = writer.settings, writer.missing()
    total = len(shard_sequences(settings)) * settings["samples"]
    there = total - sum(len(writer.chunk(first)) for first in missing) * settings["samples"]
    with tqdm(desc=writer.prefix, total=total, initial=there, unit=" samples", disable=None) as progress:
        for first in missing:
            sequences = writer.chunk(first)
            if blocks.supports_prefetch:
                blocks.prefetch(sequences)
            tokens = draw(torch.stack([blocks[index] for index in sequences])[:, : settings["prefix_length"]], first)
            writer.add(first, tokens)
            progress.update(tokens.size(0))


def _seed(seed: int, first: int) -> int:
    """Seed of the chunk that begins with sequence `first`: a hash of both, so that seeds and chunks do not overlap."""
    return int(np.random.SeedSequence([seed, first]).generate_state(1, np.uint64)[0])
