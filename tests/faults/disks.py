"""Disks that are full or may not be written to."""
import contextlib
import os
import resource
import subprocess
from pathlib import Path

import pytest

PAGE = 4096


class SmallDisk:
    """A file system in memory of `size` bytes, mounted on a folder; only root may."""

    def __init__(self, folder: Path, size: int):
        self.folder = folder
        folder.mkdir()
        self._mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder)

    def _mount(self, *words) -> None:
        done = subprocess.run(["mount", *map(str, words)], stderr=subprocess.PIPE, universal_newlines=True)
        if done.returncode != 0:
            pytest.skip(f"this machine mounts no small disk: {done.stderr.strip()}")

    def fill(self, leave: int = 0) -> None:
        """Leave so many bytes, rounded down to pages."""
        self.empty()
        state = os.statvfs(self.folder)
        with (self.folder / "filling").open("wb") as file:
            file.write(bytes(max(0, state.f_bavail * state.f_frsize - leave // PAGE * PAGE)))

    def empty(self) -> None:
        """Undo `fill`."""
        with contextlib.suppress(FileNotFoundError):
            (self.folder / "filling").unlink()

    def allow_writing(self, allow: bool) -> None:
        self._mount("-o", f"remount,{'rw' if allow else 'ro'}", self.folder)

    def unmount(self) -> None:
        subprocess.run(["umount", "-l", str(self.folder)], check=True)


@contextlib.contextmanager
def no_file_above(size: int):
    """As on a disk that is full from so many bytes a file on ("File too large"), for whoever may mount nothing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
