"""Commands on a disk that is slow to write, which say from outside to see when they are writing.

`python -m tests.faults.slow_disk ORDER` in the folder above runs one. Without ORDER it is a server: it imports everything once,
reads one order a line, forks a process for each, and answers with its number and then with the status it ended with.
An order is the JSON of `Order`.
"""
from __future__ import annotations

import builtins
import importlib
import json
import mmap
import os
import shutil
import sys
import time
from typing import List, NamedTuple

PRELOAD = [
    "fairseq_cli.train", "torch._dynamo", "fairseq_earm", "fairseq_earm.cli.sample", "fairseq_earm.cli.perplexity",
    "fairseq_earm.cli.tune", "fairseq_earm.cli.evaluate",
]
STARTING, BETWEEN, WRITING = range(3)  # before the first write; after one; while a file is half-written or yet without its name
UNFINISHED = (".tmp", ".writing", ".copying")


class Order(NamedTuple):
    """A command to run.

    Attributes:
        module: whose `main`, or for fairseq's own `cli_main`, is called.
        words: its arguments.
        output: what it prints goes to the files OUTPUT.out and OUTPUT.err.
        state: file of one byte, in which the command says whether it is writing.
        pause: seconds by which each write is slower.
    """

    module: str
    words: List[str]
    output: str
    state: str
    pause: float


class SlowFile:
    """A file that is written to in halves, with a pause between them."""

    def __init__(self, file, disk: SlowDisk):
        self._file, self._disk = file, disk

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        self._file.__enter__()
        return self

    def __exit__(self, *error):
        return self._file.__exit__(*error)

    def write(self, data):
        half = len(data) // 2
        with self._disk:
            written = self._file.write(data[:half])
            self._file.flush()
            self._disk.wait()
            return written + self._file.write(data[half:])


class SlowDisk:
    """Takes the place of `open`, `os.replace` and fast copies in this process; a context that says that something is being written."""

    def __init__(self, state: str, pause: float):
        with open(state, "r+b") as file:
            self._state = mmap.mmap(file.fileno(), 1)
        self._pause = pause
        self._open, self._replace = builtins.open, os.replace
        builtins.open, os.replace = self.open, self.replace
        os.rename = self.replace
        shutil._USE_CP_SENDFILE = False

    def __enter__(self):
        self._state[0] = WRITING

    def __exit__(self, *_):
        self._state[0] = BETWEEN

    def wait(self):
        time.sleep(self._pause)

    def open(self, file, mode="r", *args, **kwargs):
        opened = self._open(file, mode, *args, **kwargs)
        if set(mode) & set("wax+"):
            return SlowFile(opened, self)
        assert not str(file).endswith(UNFINISHED), f"{file} is read, which nobody has finished writing"
        return opened

    def replace(self, source, target, **kwargs):
        with self:
            self.wait()
            self._replace(source, target, **kwargs)
            self.wait()


def run(order: Order) -> None:
    """Run the command in this process, and end it."""
    for stream, ending in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{order.output}.{ending}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    module = importlib.import_module(order.module)
    sys.argv = [order.module, *order.words]
    SlowDisk(order.state, order.pause)
    try:
        getattr(module, "cli_main" if order.module.startswith("fairseq_cli") else "main")()
        status = 0
    except BaseException:
        status = 1
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # so that whatever is printed meanwhile is no answer
    for name in PRELOAD:
        importlib.import_module(name)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            run(Order(*json.loads(line)))
        print(process, file=answers, flush=True)
        print(os.waitpid(process, 0)[1], file=answers, flush=True)
    os._exit(0)


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        run(Order(*json.loads(sys.argv[1])))
    serve()
