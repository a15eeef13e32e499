"""Files of results that appear as a whole or not at all."""
from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import sys
from typing import BinaryIO, Iterator, Union

STREAMS = {"/dev/stdin": "/dev/fd/0", "/dev/stdout": "/dev/fd/1", "/dev/stderr": "/dev/fd/2"}


@contextlib.contextmanager
def whole_file(path: Union[str, os.PathLike]) -> Iterator[BinaryIO]:
    """A file to write to, which takes its name only when all of it is on the disk; until then what had the name stays.

    Whoever is killed leaves PATH.writing, which nothing reads and the next writer takes over. A device or a pipe is written
    to as it is, and so is /dev/stdout, wherever the shell sent it: what was printed there stays.

    Raises:
        OSError: what the file system said, or that another process is writing the same file; of this one nothing stays.
    """
    if is_device(path):
        with _open_device(os.fspath(path)) as file:
            yield file
        return
    path = os.path.realpath(path)
    unfinished = f"{path}.writing"
    with open_alone(unfinished, "ab") as file:
        try:
            file.truncate(0)
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(unfinished, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.remove(unfinished)
            raise


def is_device(path: Union[str, os.PathLike]) -> bool:
    """Whether it is there and no file to replace: a device, a pipe, a folder, or a name for what this process has open.

    The path must be as it was given: of an open pipe, `os.path.realpath` makes a name that does not exist, and of a
    redirected standard output the file's own.
    """
    path = os.fspath(path)
    return path in STREAMS or path.startswith(("/dev/fd/", "/proc/")) or (os.path.exists(path) and not os.path.isfile(path))


def _open_device(path: str) -> BinaryIO:
    opened = re.fullmatch(r"/(?:dev|proc/self)/fd/(\d+)", STREAMS.get(path, path))
    if not opened:
        return open(path, "ab")
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # what was printed before comes before
    # Opened by its name, a redirected file would have a second position, and what is printed next overwrite what is written.
    return os.fdopen(os.dup(int(opened[1])), "wb")


def open_alone(path: str, mode: str) -> BinaryIO:
    """Open a file, in a mode that creates it, for this process alone.

    Raises:
        BlockingIOError: another process has it.
        OSError: it cannot be opened.
    """
    while True:
        file = open(path, mode)
        try:
            _hold(file)
            if _has_name(file, path):
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def _has_name(file: BinaryIO, path: str) -> bool:
    """Not so where another process renamed or deleted it after it was opened here and before it was locked."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _hold(file: BinaryIO) -> None:
    """Keep a file for this process alone until it is closed, where the file system has locks.

    Raises:
        BlockingIOError: another process has it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BlockingIOError(errno.EWOULDBLOCK, "another process is writing it; wait for it, or end it") from None
    except OSError:
        pass
