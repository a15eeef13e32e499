"""Pre-generated negatives on disk, read back.

Samples lie in fairseq's memory-mapped format: item i holds the N continuations of sequence i's prefix, T tokens each, one
behind the other. `PATH.json` says how they were made; it is written last, so where it is the samples are complete. In
several shards each has its own three files, `PATH.shard0of4.bin` and so on.
"""
from __future__ import annotations

import os
import re
import struct
import zlib
from bisect import bisect_right
from typing import List

import numpy as np
import torch
from fairseq.data.indexed_dataset import MMapIndexedDataset, best_fitting_int_dtype
from torch import Tensor

from fairseq_earm.errors import UsageError
from fairseq_earm.sampling.blocks import Blocks
from fairseq_earm.sampling.store_settings import (
    SETTINGS, dictionary_hash, first_unequal, item_tokens, read_record, shard_prefix, shard_sequences,
)

PIECE = 1 << 24  # bytes read at once


def open_shard(prefix: str, record: dict, dictionary_size: int) -> MMapIndexedDataset:
    """One shard's samples, once sizes, checksums and the range of the tokens agree with its record.

    Raises:
        UsageError: files that are missing, truncated or otherwise changed.
    """
    dtype = np.dtype(best_fitting_int_dtype(dictionary_size))
    items, length = len(shard_sequences(record)), item_tokens(record)
    _check_file(f"{prefix}.bin", items * length * dtype.itemsize, record["bin_crc32"], dtype, dictionary_size)
    # 26 bytes of header; a size of 4 bytes and an address of 8 for each item.
    _check_file(f"{prefix}.idx", 26 + 12 * items, record["idx_crc32"])
    try:
        shard = MMapIndexedDataset(prefix)
    except (AssertionError, KeyError, OverflowError, ValueError, struct.error) as error:
        raise UsageError(f"{prefix}.idx is no index of fairseq's format mmap: make the samples again") from error
    index = shard._index
    one_by_one = np.arange(items) * (length * dtype.itemsize)
    if len(shard) != items or index.dtype != dtype or (shard.sizes != length).any() or (index._pointers != one_by_one).any():
        raise UsageError(f"{prefix}.idx does not list {items} items of {length} tokens: make the samples again")
    return shard


def _check_file(path: str, size: int, crc32: int, dtype: np.dtype = np.dtype("uint8"), below: int = 256) -> None:
    """Compare size, checksum and the range of the numbers in a file, a piece at a time."""
    try:
        found = os.path.getsize(path)
        if found != size:
            raise UsageError(f"{path} has {found} bytes, not {size}: it is damaged; make the samples again")
        checksum, inside = 0, True
        with open(path, "rb") as file:
            for piece in iter(lambda: file.read(PIECE), b""):
                checksum = zlib.crc32(piece, checksum)
                numbers = np.frombuffer(piece, dtype)
                inside = inside and bool(numbers.max() < below) and bool(numbers.min() >= 0)
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}): make the samples again") from None
    if checksum != crc32 or not inside:
        raise UsageError(f"{path} is damaged (its checksum or tokens are not what they should be): make the samples again")


class SampleStore:
    """Continuations of each sequence's prefix, drawn beforehand by `fairseq-earm-sample`. It can be sent to other processes.

    Attributes:
        path: as given to the command's --output.
        samples: N, continuations of each prefix.
        record: settings they were made with, by name as in `SETTINGS`.
    """

    def __init__(self, path: str, shards: List[MMapIndexedDataset], record: dict):
        self.path = path
        self.samples = record["samples"]
        self.record = record
        self._shards = shards
        self._starts = np.cumsum([0] + [len(shard) for shard in shards]).tolist()

    @classmethod
    def open(cls, path: str, blocks: Blocks, *, dictionary, prefix_length: int, flag: str = "--negatives") -> "SampleStore":
        """Open samples for the sequences whose prefixes they continue. Reads all of them once, to find damage.

        Args:
            path: without ending.
            blocks: the sequences, see `load_blocks`.
            dictionary: the data's.
            prefix_length: P, of the sequences' `blocks.sequence_length` tokens.
            flag: the flag that gave the path, for messages.
        Raises:
            UsageError: no samples, unfinished ones, a missing shard, damaged files, another dictionary, another prefix or
                sequence length, another number of sequences, or other sequences.
        """
        records = _records(path, flag)
        for record in records:
            _check_fits(f"{flag} {path}", record, blocks, dictionary, prefix_length)
        shards = [
            open_shard(shard_prefix(path, len(records), shard), record, len(dictionary))
            for shard, record in enumerate(records)
        ]
        return cls(path, shards, records[0])

    def __len__(self) -> int:
        """Number of sequences."""
        return self._starts[-1]

    def all(self, index: int) -> Tensor:
        """(N, T) all continuations of one sequence's prefix."""
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        shard = bisect_right(self._starts, index) - 1
        return self._shards[shard][index - self._starts[shard]].view(self.samples, -1)

    def draw(self, index: int, count: int, rng: np.random.Generator) -> Tensor:
        """(count, T) continuations of one sequence's prefix, chosen uniformly, none twice.

        Raises:
            UsageError: more than there are.
        """
        if count > self.samples:
            raise UsageError(
                f"{self.path} has {self.samples} samples a prefix, too few for {count}: ask for fewer, or make more with --samples"
            )
        return self.all(index)[torch.from_numpy(rng.choice(self.samples, count, replace=False))]


def _records(path: str, flag: str) -> List[dict]:
    """The records of all shards in their order, which agree in everything else."""
    numbers = _shards_found(path)
    counts = sorted({count for _, count in numbers})
    if not counts:
        unfinished = os.path.isdir(f"{path}.parts")
        remedy = "are unfinished: start the same command again" if unfinished else "do not exist: fairseq-earm-sample makes them"
        raise UsageError(f"{flag} {path}: these samples {remedy}")
    if len(counts) > 1:
        raise UsageError(f"{flag} {path}: there are samples in {counts[0]} and in {counts[1]} shards: delete those not wanted")
    missing = next((shard for shard in range(counts[0]) if (shard, counts[0]) not in numbers), None)
    if missing is not None:
        raise UsageError(
            f"{flag} {path}: shard {missing} of {counts[0]} is missing: run fairseq-earm-sample with "
            f"--num-shards {counts[0]} --shard-id {missing}"
        )
    names = [shard_prefix(path, counts[0], shard) + ".json" for shard in range(counts[0])]
    records = [read_record(name) for name in names]
    for shard, (name, record) in enumerate(zip(names, records)):
        if (record["shard_id"], record["num_shards"]) != (shard, counts[0]):
            raise UsageError(f"{name} is the record of shard {record['shard_id']} of {record['num_shards']}: it was renamed")
        difference = first_unequal(record, records[0], besides=("shard_id",))
        if difference:
            raise UsageError(f"{flag} {path}: shards 0 and {shard} differ in {SETTINGS[difference].flag}: make one of them again")
    return records


def _shards_found(path: str) -> set:
    """(shard, number of shards) of every record on disk."""
    found = {(0, 1)} if os.path.isfile(f"{path}.json") else set()
    folder, name = os.path.split(path)
    pattern = re.compile(re.escape(name) + r"\.shard([0-9]{1,9})of([1-9][0-9]{0,8})\.json")
    if os.path.isdir(folder or "."):
        matches = map(pattern.fullmatch, os.listdir(folder or "."))
        found |= {(int(match.group(1)), int(match.group(2))) for match in matches if match}
    return found


def _check_fits(what: str, record: dict, blocks: Blocks, dictionary, prefix_length: int) -> None:
    expected = {
        "dictionary_sha256": dictionary_hash(dictionary),
        "prefix_length": prefix_length,
        "sequence_length": blocks.sequence_length,
        "sequences": len(blocks),
        "text_sha256": blocks.fingerprint(),
    }
    for name, value in expected.items():
        if record[name] == value:
            continue
        flag = SETTINGS[name].flag
        if name.endswith("sha256"):
            raise UsageError(f"{what}: {flag} is another one than these samples were made with: make them again")
        raise UsageError(f"{what}: made with {flag} {record[name]}, here it is {value}: make them again, or change it")
