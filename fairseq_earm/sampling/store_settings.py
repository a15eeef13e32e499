"""How pre-generated negatives were made: every setting with what it may be, and the record of them beside the samples."""
from __future__ import annotations

import hashlib
import json
import math
import re
from typing import Callable, Dict, NamedTuple

from fairseq_earm.errors import UsageError

FORMAT = 1
LONGEST_RECORD = 65536  # bytes; ours have about a thousand
BREAK_MODES = ("none", "complete", "complete_doc", "eos")
DTYPES = ("float32", "float16", "bfloat16")


class Field(NamedTuple):
    """What a setting may be.

    Attributes:
        allowed: whether a value is one.
        description: the same in words.
        flag: how the command's user gives it.
    """

    allowed: Callable[[object], bool]
    description: str
    flag: str


def _integer(flag: str, low: int, high: int = 2**62, also: int = 0) -> Field:
    """`also`: one value below the range that is allowed too, as −1 for all."""
    description = f"{low} or more" if high == 2**62 else f"from {low} to {high}"
    if also:
        description += f", or {also}"

    def allowed(value) -> bool:
        return type(value) is int and (low <= value <= high or (also != 0 and value == also))

    return Field(allowed, description, flag)


def _choice(flag: str, *choices: str) -> Field:
    return Field(lambda value: type(value) is str and value in choices, f"one of {', '.join(choices)}", flag)


def _number(flag: str, allowed: Callable[[float], bool], description: str) -> Field:
    return Field(lambda value: type(value) is float and math.isfinite(value) and allowed(value), description, flag)


def _sha256(flag: str) -> Field:
    return Field(lambda value: type(value) is str and bool(re.fullmatch("[0-9a-f]{64}", value)), "a SHA-256", flag)


def _text(flag: str) -> Field:
    return Field(lambda value: type(value) is str and value != "", "a name", flag)


# All that decides which samples are drawn, in the order in which differences are named.
SETTINGS: Dict[str, Field] = {
    "split": _text("--gen-subset"),
    "dictionary_sha256": _sha256("the data's dictionary"),
    "prefix_length": _integer("--prefix-length", 0),
    "sequence_length": _integer("--sequence-length", 1),
    "sample_break_mode": _choice("--sample-break-mode", *BREAK_MODES),
    "sequences": _integer("the number of sequences in the data", 1),
    "text_sha256": _sha256("the text"),
    "checkpoint_sha256": _sha256("the checkpoint given by --path"),
    "samples": _integer("--samples", 1),
    "temperature": _number("--temperature", lambda value: value > 0, "a number above 0"),
    "sampling_topk": _integer("--sampling-topk", 1, also=-1),
    "sampling_topp": _number("--sampling-topp", lambda value: 0 < value <= 1 or value == -1, "above 0 and at most 1, or -1"),
    "seed": _integer("--seed", 0),
    "batch_size": _integer("--batch-size", 1),
    "dtype": _choice("--dtype", *DTYPES),
    "device": _choice("the device (--cpu)", "cpu", "cuda"),
    "num_shards": _integer("--num-shards", 1),
    "shard_id": _integer("--shard-id", 0),
}
RECORD: Dict[str, Field] = {
    "format": _integer("", FORMAT, FORMAT),
    **SETTINGS,
    "checkpoint": _text("--path"),
    "bin_crc32": _integer("", 0, 2**32 - 1),
    "idx_crc32": _integer("", 0, 2**32 - 1),
}


def dictionary_hash(dictionary) -> str:
    """SHA-256 of a dictionary's symbols in their order; their counts do not matter."""
    return hashlib.sha256("\n".join(dictionary.symbols).encode()).hexdigest()


def shard_prefix(path: str, num_shards: int, shard_id: int) -> str:
    """Path of a shard's files without their endings."""
    return path if num_shards == 1 else f"{path}.shard{shard_id}of{num_shards}"


def chunk_starts(settings: dict) -> range:
    """First sequence of each chunk that a shard consists of.

    Shards divide the chunks, not the sequences, so that what is drawn does not depend on how many shards there are.
    """
    chunks = -(-settings["sequences"] // settings["batch_size"])
    first, end = (chunks * shard // settings["num_shards"] for shard in (settings["shard_id"], settings["shard_id"] + 1))
    return range(first * settings["batch_size"], end * settings["batch_size"], settings["batch_size"])


def shard_sequences(settings: dict) -> range:
    """The sequences whose prefixes a shard continues."""
    starts = chunk_starts(settings)
    return range(starts.start, min(starts.stop, settings["sequences"]))


def item_tokens(settings: dict) -> int:
    """Tokens of one item, all of a prefix's continuations."""
    return settings["samples"] * (settings["sequence_length"] - settings["prefix_length"])


def first_unequal(one: dict, other: dict, *, besides: tuple = ()) -> str:
    """The first setting, by name, in which two differ; empty if none does."""
    return next((name for name in SETTINGS if name not in besides and one[name] != other[name]), "")


def read_record(path: str, fields: Dict[str, Field] = RECORD) -> dict:
    """Settings from a JSON file, every type and range checked.

    Raises:
        UsageError: an unreadable file, or one that this command did not write.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(LONGEST_RECORD + 1)
        if len(text) > LONGEST_RECORD:
            raise ValueError("it is too long")
        record = json.loads(text.decode("utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except (RecursionError, ValueError) as error:
        raise UsageError(f"{path} is damaged ({str(error)[:80]}): delete the samples and make them again") from None
    if not isinstance(record, dict) or record.keys() != fields.keys():
        raise UsageError(f"{path} is not the record of samples that this version can read: make them again")
    for name, field in fields.items():
        if not field.allowed(record[name]):
            shown = repr(record[name])[:60]
            raise UsageError(f"{path} is damaged: {name} is {shown}, not {field.description}; make the samples again")
    return record
