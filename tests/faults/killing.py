"""Killing commands at random moments and starting them again until they are done."""
from __future__ import annotations

import contextlib
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Callable, Iterator, List, NamedTuple, Optional

from tests.faults.slow_disk import STARTING, WRITING, Order

ROOT = Path(__file__).resolve().parents[2]
# Of so many kills one meets a whole process of its own, imports and all; the others one forked from a server that has done them.
WHOLE_PROCESS_EVERY = 10
PATIENCE = 600  # seconds


class Command(NamedTuple):
    """A command that can be killed.

    Attributes:
        name: for people.
        module: whose `main` it is.
        words: folder → arguments.
        pause: seconds by which each write is made slower, so that kills meet it.
        check: given the folder, asserts that nothing half-written bears a final name; called after each kill.
        same: given the folder and what the last run printed, asserts that both are as if it had never been killed.
    """

    name: str
    module: str
    words: Callable[[Path], list]
    pause: float
    check: Callable[[Path], None]
    same: Callable[[Path, str], None]


class Runner:
    """Runs commands one at a time, forked from a server; a context."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._state = folder / "state"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._start = dict(cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self._server = subprocess.Popen([sys.executable, "-m", "tests.faults.slow_disk"], **self._start)

    def __enter__(self) -> Runner:
        assert self._answer() == "ready"
        return self

    def __exit__(self, *_) -> None:
        self._server.stdin.close()
        self._server.wait(PATIENCE)
        self._server.stdout.close()

    def printed(self, ending: str = "out") -> str:
        return (self._folder / f"printed.{ending}").read_text()

    def state(self) -> int:
        """What the command was doing when it was last seen."""
        return self._state.read_bytes()[0]

    def run(self, command: Command, folder: Path) -> float:
        """Run a command to its end; the seconds it took."""
        begun = time.monotonic()
        with self._started(command, folder) as (_, status):
            assert status(PATIENCE) == 0, self.printed("err")[-2000:]
        return time.monotonic() - begun

    def kill(self, command: Command, folder: Path, delay: float, *, in_write: bool, whole: bool) -> bool:
        """Run a command and kill it after `delay` seconds, or at the first write after them; False: it had ended before."""
        with self._started(command, folder, whole) as (process, status):
            if whole:
                self._await(lambda: self.state() != STARTING or status(0) is not None)
            if status(delay) is None and in_write:
                self._await(lambda: self.state() == WRITING or status(0) is not None)
            ended = status(0)
            if ended is None:
                os.kill(process, signal.SIGKILL)
                ended = status(PATIENCE)
        if ended != 0:
            assert ended == signal.SIGKILL, self.printed("err")[-2000:]
        return ended != 0

    @contextlib.contextmanager
    def _started(self, command: Command, folder: Path, whole: bool = False) -> Iterator[tuple]:
        """Number of a process, and a function that waits for at most so many seconds for its status."""
        self._state.write_bytes(bytes([STARTING]))
        words = [str(word) for word in command.words(folder)]
        order = json.dumps(Order(command.module, words, str(self._folder / "printed"), str(self._state), command.pause))
        if whole:
            process = subprocess.Popen([sys.executable, "-m", "tests.faults.slow_disk", order], cwd=ROOT, env=self._start["env"])
            yield process.pid, lambda seconds: _waited(process, seconds)
            return
        self._server.stdin.write(order.encode() + b"\n")
        number, found = int(self._answer()), []

        def status(seconds: float) -> Optional[int]:
            if not found and select.select([self._server.stdout], [], [], seconds)[0]:
                found.append(int(self._answer()))
            return found[0] if found else None

        yield number, status

    def _answer(self) -> str:
        return self._server.stdout.readline().decode().strip()

    def _await(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, self.printed("err")[-2000:]
            time.sleep(0.0002)


def _waited(process: subprocess.Popen, seconds: float) -> Optional[int]:
    """As `os.waitpid` says it."""
    try:
        return abs(process.wait(seconds))
    except subprocess.TimeoutExpired:
        return None


class Kills(NamedTuple):
    """What became of a series of kills."""

    seconds: float
    found: Counter
    finished: int

    def line(self, name: str) -> str:
        before, between, within = (self.found[state] for state in range(3))
        return (
            f"{name}: {sum(self.found.values())} kills ({before} before the first write, {between} between writes, {within} within one), "
            f"{self.finished} runs came to their end, {self.seconds:.0f} s"
        )


def kill_often(runner: Runner, command: Command, folder: Path, duration: float, kills: int, seed: int = 1) -> Kills:
    """Kill a command, start it again in the same folder, and so on; where it ends first, look at what it did and start afresh.

    Args:
        duration: seconds that it takes; moments are drawn evenly from these. Every other kill waits for the next write.
    """
    rng = random.Random(f"{command.name} {seed}")
    found, finished, begun = Counter(), 0, time.monotonic()
    while sum(found.values()) < kills:
        assert finished <= 5 * kills, f"{command.name} ends before it can be killed"
        number = sum(found.values()) + 1
        kinds = dict(in_write=number % 2 == 0, whole=number % WHOLE_PROCESS_EVERY == 0)
        if runner.kill(command, folder, rng.uniform(0, duration), **kinds):
            found[runner.state()] += 1
            command.check(folder)
        else:
            _end(runner, command, folder)
            finished += 1
    runner.run(command, folder)
    _end(runner, command, folder)
    return Kills(time.monotonic() - begun, found, finished + 1)


def _end(runner: Runner, command: Command, folder: Path) -> None:
    command.same(folder, runner.printed())
    shutil.rmtree(folder)
    folder.mkdir()


def leftovers(folder: Path) -> List[str]:
    """Files of writers that did not finish."""
    return [str(path) for path in folder.rglob("*") if path.suffix in (".tmp", ".writing", ".copying", ".partial", ".parts")]
