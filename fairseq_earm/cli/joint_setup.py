"""What `fairseq-earm-perplexity` measures: sequences of a split, and a base model with an energy that reads them."""
from __future__ import annotations

import argparse
import logging
import os
from typing import Any, Callable, List, NamedTuple, Optional

import torch
from fairseq import utils
from fairseq.models import FairseqEncoderDecoderModel

from fairseq_earm.cli.common import device, dtype, text_dictionary, text_task
from fairseq_earm.errors import UsageError
from fairseq_earm.evaluation.data_folder import check_data_folder
from fairseq_earm.evaluation.joint_models import (
    LanguageJoint, OwnLanguageEnergies, TranslationJoint, network_energies, own_energies,
)
from fairseq_earm.evaluation.residual import JointModel
from fairseq_earm.evaluation.translate import load_pairs, own_task, pairs_hash
from fairseq_earm.models.load_energy import load_energy, report_other_base
from fairseq_earm.sampling.ancestral import AncestralSampler, max_lengths
from fairseq_earm.sampling.base_lm import load_base_lm
from fairseq_earm.sampling.blocks import load_blocks
from fairseq_earm.sampling.frozen import FrozenModel, load_frozen
from fairseq_earm.sampling.scoring import check_post_step
from fairseq_earm.tasks.residual_language_modeling import ResidualLanguageModelingTask
from fairseq_earm.tasks.residual_translation import ResidualTranslationTask

logger = logging.getLogger(__name__)

LENGTHS = ("prefix_length", "sequence_length")
MAX_LEN_A, MAX_LEN_B = 1.5, 10  # of pairs, unless told otherwise


class Measured(NamedTuple):
    """A joint model and the sequences it is measured on.

    Attributes:
        model: for `measure_sequence`.
        indices: the sequences' numbers in the split, ascending.
        item: number → what the model takes.
        skipped: sequences of the split left out because of their length.
        cut: how many of `indices` are longer sentences that lost their end.
        conditions: what the figures are conditioned on, in a sentence or two.
        data: what tells the sequences from others, JSON values by name.
    """

    model: JointModel
    indices: List[int]
    item: Callable[[int], Any]
    skipped: int
    cut: int
    conditions: str
    data: dict


def open_measured(args: argparse.Namespace) -> Measured:
    """Load what the flags name.

    Raises:
        UsageError: whatever does not exist, does not fit together, or leaves nothing to measure.
    """
    check_data_folder(args.data)
    if os.path.isfile(os.path.join(args.data, "dict.txt")):
        return _language(args)
    return _translation(args)


def _language(args: argparse.Namespace) -> Measured:
    if args.energy and args.energy_step == "post":
        raise UsageError("--energy-step post: text has no last step to come after; leave the flag out")
    limits = getattr(args, "max_len_a", MAX_LEN_A), getattr(args, "max_len_b", MAX_LEN_B)
    if limits != (MAX_LEN_A, MAX_LEN_B):
        raise UsageError(
            f"--max-len-a {limits[0]:g} --max-len-b {limits[1]}: for pairs of sentences; samples of text are as long as "
            "--sequence-length says"
        )
    dictionary = text_dictionary(args.data)
    data = text_task(dictionary, args.data)
    energy = _energy(args, data, ResidualLanguageModelingTask)
    prefix, length, break_mode = _lengths(args, energy)
    if energy and length > energy.model.max_positions():
        raise UsageError(
            f"--sequence-length {length}: --energy-path {args.energy_path} reads {energy.model.max_positions()} tokens at most; "
            "give a smaller length, or a network trained with a larger --max-positions"
        )
    base = load_base_lm(args.path, data, flag="--path", sequence_length=length, dtype=dtype(args))
    blocks = load_blocks(
        os.path.join(args.data, args.gen_subset), dictionary, sequence_length=length, break_mode=break_mode,
        combine=args.gen_subset == "train",
    )
    indices = spread(len(blocks), args.max_sequences)
    text = blocks.fingerprint()  # before `prefetch`: it reads other sequences into memory, in the place of those there
    if blocks.supports_prefetch:
        blocks.prefetch(indices)
    model = base.to(device(args)).model
    if args.energy:
        energies = OwnLanguageEnergies(model)
    else:
        energies = energy.to(device(args)).model if energy else None
    return Measured(
        LanguageJoint(model, energies, prefix, chunk=args.batch_size),
        indices,
        lambda index: blocks[index].to(device(args)),
        blocks.skipped,
        int(blocks.cut[indices].sum()),
        _language_conditions(prefix, length, break_mode),
        {"text_sha256": text, "prefix_length": prefix, "sequence_length": length},
    )


def _energy(args: argparse.Namespace, data, kind: type) -> Optional[FrozenModel]:
    """The energy network of --energy-path, if there is one, which must have been trained for this kind of task."""
    if not args.energy_path:
        return None
    energy = load_energy(args.energy_path, data, dtype=dtype(args))
    if not isinstance(energy.task, kind):
        raise UsageError(
            f"--energy-path {args.energy_path} was trained for {type(energy.task).__name__}, and {args.data} is data for {kind.__name__}"
        )
    report_other_base(energy, args.energy_path, args.path)
    return energy


def _lengths(args: argparse.Namespace, energy: Optional[FrozenModel]) -> tuple:
    """Prefix length, sequence length and break mode: from the flags, or else as the energy was trained."""
    trained = energy.task.cfg if energy else None
    for name in LENGTHS:
        flag, value, own = f"--{name.replace('_', '-')}", getattr(args, name), getattr(trained, name, None)
        if value is None and own is None:
            raise UsageError(f"{flag} is missing: give it, or an --energy-path that was trained with it")
        if None not in (value, own) and value != own:
            logger.warning("%s %d, but the energy was trained with %d", flag, value, own)
    prefix, length = (getattr(trained, name) if getattr(args, name) is None else getattr(args, name) for name in LENGTHS)
    if not 0 <= prefix < length:
        raise UsageError(
            f"--prefix-length {prefix} of --sequence-length {length} leaves nothing to predict: give a prefix of 0 to {length - 1}"
        )
    return prefix, length, str(args.sample_break_mode or getattr(trained, "sample_break_mode", "none"))


def _language_conditions(prefix: int, length: int, break_mode: str) -> str:
    given = f"its first {prefix} tokens are given and the other {length - prefix} are" if prefix else f"all {length} tokens are"
    return (
        f"A sequence is a block of {length} tokens (break mode {break_mode}) and all the context there is; {given} predicted. "
        "End-of-sentence is a token like any other. Padding has no probability."
    )


def _translation(args: argparse.Namespace) -> Measured:
    given = [name for name in (*LENGTHS, "sample_break_mode", "per_step") if getattr(args, name)]
    if given:
        flag = given[0].replace("_", "-")
        raise UsageError(
            f"--{flag} is for text of one language, with a dict.txt; {args.data} has none, and pairs have sources for prefixes"
        )
    task = own_task(args.path, args.data, flag="--path")
    base = load_frozen(args.path, task, flag="--path", dtype=dtype(args)).to(device(args)).model
    if not isinstance(base, FairseqEncoderDecoderModel):
        raise UsageError(f"--path {args.path} is a {type(base).__name__}: for pairs of sentences give an encoder-decoder model")
    dataset, kept = _pairs(args, task, base)
    indices = [kept[i] for i in spread(len(kept), args.max_sequences)]
    if args.energy_step == "post":
        check_post_step(base.decoder, int(torch.as_tensor(dataset.tgt_sizes)[indices].max()) + 1)
    sampler = AncestralSampler(task.target_dictionary, max_len_a=args.max_len_a, max_len_b=args.max_len_b)
    model = TranslationJoint(base, _translation_energies(args, task, base), sampler, chunk=args.batch_size)

    def item(index: int) -> dict:
        batch = dataset.collater([dataset[index]])
        return utils.move_to_cuda(batch) if device(args).type == "cuda" else batch

    return Measured(
        model, indices, item, len(dataset) - len(kept), 0,
        f"A source sentence is given, and the whole translation predicted, end-of-sentence included. Samples have at most "
        f"{args.max_len_a:g} times the source's length plus {args.max_len_b} tokens, which {_too_long(args, dataset, indices, base)} "
        "of the translations exceed. Padding has no probability.",
        {"text_sha256": pairs_hash(dataset, indices), "max_len_a": args.max_len_a, "max_len_b": args.max_len_b},
    )


def _pairs(args: argparse.Namespace, task, base) -> tuple:
    """The split's dataset, and the numbers of the pairs that the model has positions for."""
    dataset = load_pairs(task, args.data, args.gen_subset)
    limits = base.max_positions()
    everything = torch.arange(len(dataset)).numpy()
    kept = sorted(dataset.filter_indices_by_size(everything, limits)[0].tolist())
    if not kept:
        raise UsageError(f"--gen-subset {args.gen_subset}: no sentence is left that fits the model's positions {limits}")
    return dataset, kept


def _translation_energies(args: argparse.Namespace, task, base):
    if args.energy:
        return own_energies(base, args.energy_step)
    if not args.energy_path:
        return None
    energy = _energy(args, task, ResidualTranslationTask).to(device(args))
    return network_energies(energy.model, energy.task.energy_pad, energy.task.shift)


def _too_long(args: argparse.Namespace, dataset, indices: List[int], base) -> int:
    """Translations longer than the longest sample: the joint model has no probability for them."""
    sources, targets = (torch.as_tensor(sizes)[indices] for sizes in (dataset.src_sizes, dataset.tgt_sizes))
    return int((targets > max_lengths(sources, args.max_len_a, args.max_len_b, base.decoder)).sum())


def spread(count: int, maximum: Optional[int]) -> List[int]:
    """Up to `maximum` of the numbers below `count`, evenly spaced."""
    number = min(count, maximum or count)
    return [i * count // number for i in range(number)]


def numbers(text: str) -> List[int]:
    """One value of a flag that takes several whole numbers, with or without commas between them; for argparse."""
    return [int(number) for number in text.split(",")]
