"""Records of finished work that survive a kill: one line of JSON each, the settings they were made with first."""
from __future__ import annotations

import json
import os
from typing import Dict

from fairseq_earm.errors import UsageError


class WorkFile:
    """A file of records by index, to go on with where a killed run stopped.

    A last line that was not written to its end is dropped. Nothing is opened for longer than a line takes to write.

    Args:
        path: the file, which need not exist.
        settings: everything the records depend on, JSON values by name.
        flag: what the user gave for the path, for messages.

    Attributes:
        records: index → record, those found in the file and those added.

    Raises:
        UsageError: the file was begun with other settings (names the first that differs), is damaged or cannot be written.
    """

    def __init__(self, path: str, settings: dict, *, flag: str):
        self.path = path
        self._flag = flag
        self.records: Dict[int, dict] = {}
        settings = json.loads(json.dumps(settings))
        try:
            begun = self._read(settings)
        except OSError as error:
            raise self._cannot_write(error) from None
        if not begun:
            self._write({"settings": settings})

    def add(self, record: dict) -> None:
        """Keep the record, which has an `index`, and write it down at once.

        Raises:
            UsageError: it cannot be written; those before it are kept.
        """
        self._write(record)
        self.records[record["index"]] = record

    def remove(self) -> None:
        """Delete the file: the work is done and its results are elsewhere."""
        os.remove(self.path)

    def _read(self, settings: dict) -> bool:
        """Whether there was a file with anything in it."""
        if not os.path.exists(self.path):
            return False
        with open(self.path, "rb+") as file:
            content = file.read()
            whole = content[: content.rfind(b"\n") + 1]
            file.truncate(len(whole))
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            theirs = [line["settings"] for line in lines[:1]]
            self.records = {line["index"]: line for line in lines[1:]}
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"{self.path} is damaged: delete it to start afresh") from None
        for other in theirs:
            self._check(settings, other)
        return bool(lines)

    def _check(self, settings: dict, theirs: dict) -> None:
        for name in sorted({*settings, *theirs}):
            if settings.get(name) != theirs.get(name):
                raise UsageError(
                    f"{self.path} holds part of a run with another {name} ({theirs.get(name)}, now {settings.get(name)}): "
                    "delete it to start afresh, or write elsewhere"
                )

    def _write(self, line: dict) -> None:
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise self._cannot_write(error) from None

    def _cannot_write(self, error: OSError) -> UsageError:
        kept = f"; {len(self.records)} finished records are kept, start the same command again" if self.records else ""
        return UsageError(f"{self._flag}: {self.path} cannot be written: {error.strerror}{kept}")
