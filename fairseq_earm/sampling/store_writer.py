"""Writing pre-generated negatives, so that being killed at any moment loses and doubles nothing."""
from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import zlib
from typing import IO, Callable, List, Optional, Set

import numpy as np
from fairseq.data.indexed_dataset import MMapIndexedDataset, best_fitting_int_dtype
from torch import Tensor
from tqdm import tqdm

from fairseq_earm.errors import UsageError
from fairseq_earm.sampling import store, store_settings

logger = logging.getLogger(__name__)

PART = re.compile(r"part-\d+")
OURS = re.compile(r"(part-\d+|settings\.json|record\.json|merged\.bin|merged\.idx)(\.tmp)?|lock")
CHECKSUM_BYTES = 4  # a CRC-32 at the end of each part


class StoreWriter:
    """Writes one shard, chunk by chunk; a context in which no other process can write the same.

    Each chunk becomes a file of its own in the folder `PATH.parts`, whole or not at all: it is written under another
    name, synced and renamed, and ends with a checksum that covers the settings. `finish` puts them together. What lies
    there when the same command is started again is kept, unless it was damaged. Within its lock the context looks again
    at what is there: another process may have begun or finished the shard in the meantime.

    Args:
        path: --output.
        settings: all of `store_settings.SETTINGS`.
        checkpoint: the model's path, noted for people.
        dictionary_size: tokens are below it.
    Attributes:
        prefix: path of the shard's files without their endings.
        settings: as given.
        finished: whether the shard was complete, and whole, from the beginning, or when the context was entered.
    Raises:
        UsageError: there are samples made with other settings (names the first), or other files that bear the name,
            from the beginning or when the context is entered; in the context, for all that the file system refuses.
    """

    def __init__(self, path: str, settings: dict, *, checkpoint: str, dictionary_size: int):
        self.prefix = store_settings.shard_prefix(path, settings["num_shards"], settings["shard_id"])
        self.settings = settings
        self._checkpoint = checkpoint
        self._dictionary_size = dictionary_size
        self._dtype = best_fitting_int_dtype(dictionary_size)
        self._folder = f"{self.prefix}.parts"
        self._whole = set()  # first sequences of parts that were written or checked
        self._spoken_of = []  # names of damaged parts
        self._look()

    def _look(self) -> None:
        """See whether the shard is finished, and refuse what was made with other settings or by somebody else."""
        names = self._names()  # before the record, which another process writes before it removes them
        self.finished = os.path.exists(f"{self.prefix}.json")
        if self.finished:
            record = store_settings.read_record(f"{self.prefix}.json")
            self._check_same(record, f"{self.prefix}.json")
            store.open_shard(self.prefix, record, self._dictionary_size)
        elif any(map(PART.fullmatch, names)):
            self._check_same(store_settings.read_record(self._inside("settings.json"), store_settings.SETTINGS), self._folder)
        else:
            self._check_name_is_free()

    def _check_same(self, record: dict, where: str) -> None:
        name = store_settings.first_unequal(record, self.settings)
        if not name:
            return
        values = f" {record[name]}, this is {self.settings[name]}"
        difference = " is another one" if name.endswith("sha256") else values
        raise UsageError(
            f"{where} was made with other settings: {store_settings.SETTINGS[name].flag}{difference}; give the same, or another "
            f"--output, or delete {where}"
        )

    def _check_name_is_free(self) -> None:
        for path in (f"{self.prefix}.bin", f"{self.prefix}.idx"):
            if os.path.exists(path):
                raise UsageError(f"--output: {path} exists and is no unfinished work of this command: give another folder")

    def __enter__(self) -> "StoreWriter":
        with self._clear_errors(), contextlib.ExitStack() as stack:
            stack.enter_context(self._lock())
            if os.path.exists(f"{self.prefix}.json"):
                self.remove_parts()  # another process finished; without it the lock's own folder would stay
            self._look()
            if not self.finished:
                self._write("settings.json", lambda file: file.write(_json(self.settings)))
            self._held = stack.pop_all()
        return self

    def _lock(self) -> IO:
        """A file that no other process can lock until it is closed."""
        while True:
            os.makedirs(self._folder, exist_ok=True)
            lock = open(self._inside("lock"), "w")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                raise UsageError(f"--output {self.prefix}: another process is writing it: wait for it, or end it") from None
            if _is_at(lock, self._inside("lock")):
                return lock
            lock.close()  # who held it finished and removed it: it keeps nobody out

    def __exit__(self, *_) -> None:
        self._held.close()

    def missing(self) -> List[int]:
        """First sequence of each chunk that is yet to be drawn. A damaged part counts as none, and is spoken of."""
        if self.finished:
            return []
        there = self._names()
        starts = store_settings.chunk_starts(self.settings)
        self._check([first for first in starts if _part(first) in there and first not in self._whole])
        return [first for first in starts if _part(first) not in there or first not in self._whole]

    def _check(self, unchecked: List[int]) -> None:
        progress = tqdm(unchecked, desc="checking", unit=" chunks", disable=None if unchecked else True)
        self._whole.update(first for first in progress if self._read_part(first) is not None)
        damaged = [_part(first) for first in unchecked if first not in self._whole]
        if damaged and damaged != self._spoken_of:
            more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
            logger.warning(
                "%s%s: damaged, or of other settings or another version; drawn again", self._inside(damaged[0]), more
            )
            self._spoken_of = damaged

    def chunk(self, first: int) -> range:
        """The sequences of the chunk that begins with `first`."""
        return range(first, min(first + self.settings["batch_size"], self.settings["sequences"]))

    def add(self, first: int, tokens: Tensor) -> None:
        """Keep the samples of one chunk: (B, N · T) or (B · N, T) tokens in the order of the sequences."""
        data = tokens.cpu().numpy().astype(self._dtype).tobytes()
        with self._clear_errors():
            self._write(_part(first), lambda file: file.write(data + self._checksum(first, data)))
        self._whole.add(first)

    def finish(self) -> None:
        """Put all parts together, if no other process did. The record is written last, then the parts are removed."""
        if self.finished:
            return
        with self._clear_errors():
            checksums = {"bin_crc32": self._merge_parts(), "idx_crc32": self._write_index()}
            os.replace(self._inside("merged.bin"), f"{self.prefix}.bin")
            os.replace(self._inside("merged.idx"), f"{self.prefix}.idx")
            record = {"format": store_settings.FORMAT, **self.settings, "checkpoint": self._checkpoint, **checksums}
            self._write("record.json", lambda file: file.write(_json(record)))
            os.replace(self._inside("record.json"), f"{self.prefix}.json")
            _sync_folder(os.path.dirname(self.prefix) or ".")
            self.remove_parts()

    def remove_parts(self) -> None:
        """Remove what is ours in the folder of parts, and the folder if nothing else is in it."""
        for name in sorted(filter(OURS.fullmatch, self._names())):  # parts before the settings that say what they are
            with contextlib.suppress(FileNotFoundError):  # another process removes them too
                os.remove(self._inside(name))
        with contextlib.suppress(OSError):
            os.rmdir(self._folder)

    def _read_part(self, first: int) -> Optional[bytes]:
        """The tokens of one chunk; None where they are not what was written."""
        size = len(self.chunk(first)) * store_settings.item_tokens(self.settings) * np.dtype(self._dtype).itemsize
        try:
            if os.path.getsize(self._inside(_part(first))) != size + CHECKSUM_BYTES:
                return None
            with open(self._inside(_part(first)), "rb") as file:
                content = file.read()
        except OSError:
            return None
        data = content[:size]
        return data if content[size:] in (self._checksum(first, data), _checksum_of_0_1(first, data)) else None

    def _checksum(self, first: int, data: bytes) -> bytes:
        """Of a part's data, of its place, and of the settings that it was made with."""
        made = json.dumps([self.settings, first], sort_keys=True).encode()
        return zlib.crc32(data, zlib.crc32(made)).to_bytes(CHECKSUM_BYTES, "little")

    def _merge_parts(self) -> int:
        """Write `merged.bin`; its CRC-32."""
        checksum = 0

        def copy_all(file):
            nonlocal checksum
            for first in tqdm(store_settings.chunk_starts(self.settings), desc="merging", unit=" chunks", disable=None):
                data = self._read_part(first)
                if data is None:
                    raise UsageError(f"{self._inside(_part(first))} is damaged: start the same command again, which draws it again")
                checksum = zlib.crc32(data, checksum)
                file.write(data)

        self._write("merged.bin", copy_all)
        return checksum

    def _write_index(self) -> int:
        """Write `merged.idx`, by fairseq; its CRC-32."""
        path = self._inside("merged.idx")
        items, length = len(store_settings.shard_sequences(self.settings)), store_settings.item_tokens(self.settings)
        with MMapIndexedDataset.Index.writer(path, self._dtype) as index:
            index.write([length] * items)
        checksum = 0
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            for piece in iter(lambda: file.read(store.PIECE), b""):
                checksum = zlib.crc32(piece, checksum)
        return checksum

    def _write(self, name: str, write: Callable) -> None:
        """Make a file of the folder appear whole or not at all, also if the power fails."""
        path = self._inside(name)
        with open(f"{path}.tmp", "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
        _sync_folder(self._folder)

    def _names(self) -> Set[str]:
        """Of the files in the folder of parts; none where the folder is missing: who finishes removes it."""
        try:
            return set(os.listdir(self._folder))
        except (FileNotFoundError, NotADirectoryError):
            return set()

    def _inside(self, name: str) -> str:
        return os.path.join(self._folder, name)

    @contextlib.contextmanager
    def _clear_errors(self):
        try:
            yield
        except OSError as error:
            raise UsageError(
                f"--output {self.prefix} cannot be written ({error.strerror or error}): the chunks that are finished are kept; "
                "make room or leave to write, and start the same command again"
            ) from error


def _part(first: int) -> str:
    return f"part-{first}"


def _checksum_of_0_1(first: int, data: bytes) -> bytes:
    """What version 0.1 wrote, whose unfinished work is gone on with: of a part's data and of its place."""
    return zlib.crc32(data, zlib.crc32(_part(first).encode())).to_bytes(CHECKSUM_BYTES, "little")


def _is_at(file: IO, path: str) -> bool:
    """Whether an open file is still the one that has this path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _json(record: dict) -> bytes:
    return (json.dumps(record, indent=2) + "\n").encode()


def _sync_folder(folder: str) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
