"""Files of results that appear as a whole or not at all."""
from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from typing import BinaryIO, Iterator, Union


@contextlib.contextmanager
def whole_file(path: Union[str, os.PathLike]) -> Iterator[BinaryIO]:
    """A file to write to, which takes its name only when all of it is on the disk; until then what had the name stays.

    Whoever is killed leaves PATH.writing, which nothing reads and the next writer takes over. A device or a pipe is written
    to as it is.

    Raises:
        OSError: what the file system said, or that another process is writing the same file; of this one nothing stays.
    """
    path = os.path.realpath(path)
    if os.path.exists(path) and not os.path.isfile(path):
        with open(path, "wb") as file:
            yield file
        return
    unfinished = f"{path}.writing"
    with open(unfinished, "ab") as file:
        hold(file)
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


def hold(file) -> None:
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
