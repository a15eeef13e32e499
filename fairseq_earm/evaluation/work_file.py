"""Records of finished work that survive a kill: one line of JSON each, the settings they were made with first."""
from __future__ import annotations

import contextlib
import json
import os
import zlib
from typing import ContextManager, Dict, Optional

from fairseq_earm.errors import UsageError
from fairseq_earm.evaluation.whole_file import is_device, open_alone


CHECKSUM = "crc32"
BEGINNING = b'{"settings": '


def open_work(json_path: Optional[str], settings: dict) -> ContextManager[Optional["WorkFile"]]:
    """The work file of a command's --json, as a context: JSON_PATH.partial; none without --json, or where it is a pipe."""
    if not json_path or is_device(json_path):
        return contextlib.nullcontext()
    return WorkFile(f"{json_path}.partial", settings, flag=f"--json {json_path}")


def _marked(record: dict) -> bytes:
    """A line, with the checksum of what is in it."""
    return json.dumps({**record, CHECKSUM: zlib.crc32(json.dumps(record).encode())}).encode()


def _checked(line: bytes) -> dict:
    """The record of a line.

    Raises:
        ValueError: it is not as it was written; or others, of what is no line of ours.
    """
    record = json.loads(line)
    checksum = record.pop(CHECKSUM)
    if zlib.crc32(json.dumps(record).encode()) != checksum or type(record["index"]) is not int:
        raise ValueError("not as it was written")
    return record


class WorkFile:
    """A file of records by index, to go on with where a killed run stopped; a context in which it is this process's alone.

    A last line that was not written to its end is dropped.

    Args:
        path: the file, which need not exist.
        settings: everything the records depend on, JSON values by name.
        flag: what the user gave for the path, for messages.

    Attributes:
        records: index → record, those found in the file and those added.

    Raises:
        UsageError: the file was begun with other settings (names the first that differs), is damaged, cannot be written, or
            another process is writing it.
    """

    def __init__(self, path: str, settings: dict, *, flag: str):
        self.path = path
        self._flag = flag
        self.records: Dict[int, dict] = {}
        settings = json.loads(json.dumps(settings))
        try:
            self._file = open_alone(path, "ab+")
        except OSError as error:
            raise self._cannot_write(error) from None
        try:
            if not self._read(settings):
                self._write({"settings": settings})
        except OSError as error:
            self._file.close()
            raise self._cannot_write(error) from None
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "WorkFile":
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(OSError):  # a full disk was spoken of when the line was written
            self._file.close()

    def add(self, record: dict) -> None:
        """Keep the record, which has an `index`, and write it down at once.

        Raises:
            UsageError: it cannot be written; those before it are kept.
        """
        self._write(record)
        self.records[record["index"]] = record

    def remove(self) -> None:
        """Delete the file: the work is done and its results are elsewhere."""
        with contextlib.suppress(FileNotFoundError):
            os.remove(self.path)

    def _read(self, settings: dict) -> bool:
        """Whether there is anything in the file."""
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        first, *others = whole.splitlines() or [b""]
        try:
            if not whole and content[: len(BEGINNING)] != BEGINNING[: len(content)]:
                raise ValueError("not ours")
            theirs = json.loads(first)["settings"] if first else settings
            if not isinstance(theirs, dict):
                raise ValueError("no settings")
            self.records = {record["index"]: record for record in map(_checked, others)}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UsageError(f"{self.path} is damaged: delete it to start afresh") from None
        self._check(settings, theirs)
        self._file.truncate(len(whole))
        return bool(whole)

    def _check(self, settings: dict, theirs: dict) -> None:
        for name in sorted({*settings, *theirs}):
            if settings.get(name) != theirs.get(name):
                raise UsageError(
                    f"{self.path} holds part of a run with another {name} ({theirs.get(name)}, now {settings.get(name)}): "
                    "delete it to start afresh, or write elsewhere"
                )

    def _write(self, line: dict) -> None:
        try:
            self._file.write(_marked(line) + b"\n")
            self._file.flush()
        except OSError as error:
            raise self._cannot_write(error) from None

    def _cannot_write(self, error: OSError) -> UsageError:
        kept = f"; {len(self.records)} finished records are kept, start the same command again" if self.records else ""
        return UsageError(f"{self._flag}: {self.path} cannot be written: {error.strerror}{kept}")
