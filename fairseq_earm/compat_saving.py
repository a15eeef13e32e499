"""Checkpoints as fairseq writes them: each appears whole or not at all, and a disk that refuses is one line that loses nothing."""
from __future__ import annotations

import contextlib
import logging
import os
import time
from typing import Callable, Optional

from fairseq_earm.compat import _wrap
from fairseq_earm.errors import UsageError

logger = logging.getLogger("fairseq_earm")

ATTEMPTS = 3
PAUSE = 2.5  # seconds between them, as in fairseq: a file system on the network may come back


def write_checkpoints_whole() -> None:
    """Three places where fairseq writes: the folder's test at the start, a checkpoint, and its copies under other names.

    fairseq writes a checkpoint under another name and renames it. But where its first attempt fails half-way, it appends
    the next one to what the first one left, and renames what nobody can read. And it copies straight into
    checkpoint_last.pt: a run killed meanwhile could not be resumed from it.
    """
    from fairseq import checkpoint_utils
    from fairseq.file_io import PathManager

    _wrap(checkpoint_utils, "verify_checkpoint_directory", _verified)
    _wrap(checkpoint_utils, "torch_persistent_save", _saved)
    _wrap(PathManager, "copy", _copied)


def _verified(original: Callable) -> Callable:
    def verify_checkpoint_directory(save_dir):
        try:
            original(save_dir)
        except OSError as error:
            raise UsageError(
                f"--save-dir {save_dir} cannot be written: {error.strerror or error}; make room or leave to write, or give another"
            ) from None

    return verify_checkpoint_directory


def _saved(original: Callable) -> Callable:
    import torch
    from fairseq.file_io import PathManager

    def torch_persistent_save(obj, filename, async_write=False):
        if async_write or not isinstance(filename, str) or not PathManager.supports_rename(filename):
            return original(obj, filename, async_write)
        _appear_whole(filename, "tmp", lambda path: _write(path, lambda file: torch.save(obj, file)))

    return torch_persistent_save


def _copied(original: Callable) -> Callable:
    from fairseq.file_io import PathManager

    def copy(src_path, dst_path, overwrite=False):
        if not overwrite or not PathManager.isfile(src_path) or not PathManager.supports_rename(dst_path):
            return original(src_path, dst_path, overwrite)

        def write(path):
            if not original(src_path, path, True):
                raise OSError(f"{src_path} was not copied")
            _write(path, lambda file: None, mode="rb+")

        _appear_whole(dst_path, "copying", write)
        return dst_path

    return copy


def _write(path: str, write: Callable, mode: str = "wb") -> None:
    """A file whose content is on the disk when this returns, so that a failing power supply leaves the old one or the new."""
    with open(path, mode) as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def _appear_whole(filename: str, ending: str, write: Callable) -> None:
    """Write under another name and rename; of a failed attempt nothing stays.

    Raises:
        UsageError: the file system refused each time.
    """
    unfinished = f"{filename}.{ending}"
    for attempt in range(1, ATTEMPTS + 1):
        try:
            write(unfinished)
            os.replace(unfinished, filename)
            return
        except BaseException as error:
            with contextlib.suppress(OSError):
                os.remove(unfinished)
            refusal = _refusal(error) if isinstance(error, Exception) else None
            if refusal is None:
                raise
            if attempt == ATTEMPTS:
                raise UsageError(
                    f"{filename} cannot be written: {refusal.strerror or refusal}; the checkpoint written before it is whole: "
                    "make room or leave to write, and start the same command again"
                ) from None
            logger.warning("%s cannot be written (%s); attempt %d of %d follows", filename, refusal, attempt + 1, ATTEMPTS)
            time.sleep(PAUSE)


def _refusal(error: Optional[BaseException]) -> Optional[OSError]:
    """What the file system said: torch raises an error of its own on top of it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error
