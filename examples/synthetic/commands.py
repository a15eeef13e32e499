"""The demonstration's commands: how they read, and how they are run side by side."""
from __future__ import annotations

import importlib
import multiprocessing
import os
import shlex
import sys
import threading
import time
from pathlib import Path
from typing import List, Sequence

from tqdm import tqdm

HERE = Path(__file__).resolve().parent
PLUGIN = HERE.parents[1] / "fairseq_earm"
# Imported once, in a server process that commands are forked from, because each would take seconds to start. torch._dynamo is
# what every optimizer imports; where torch has none, its absence is passed over.
PRELOAD = ["fairseq_cli.train", "fairseq_cli.generate", "fairseq_cli.preprocess", "sacrebleu", "torch._dynamo"]


class CommandFailed(RuntimeError):
    """A command ended with an error; the message holds the end of its output."""


def preprocess_command(raw: Path, binary: Path) -> List[str]:
    """Binarise raw/{train,valid,test}.{src,tgt}."""
    prefixes = [f"--{split}pref={raw / split}" for split in ("train", "valid", "test")]
    return ["fairseq-preprocess", "--source-lang", "src", "--target-lang", "tgt", *prefixes, f"--destdir={binary}"]


def train_command(binary: Path, save_dir: Path, flags: Sequence[str]) -> List[str]:
    """Train on `binary`, leaving checkpoint_last.pt in `save_dir`."""
    return [
        "fairseq-train", str(binary), f"--user-dir={PLUGIN}", "--task", "earm_translation", "--cpu",
        f"--save-dir={save_dir}", "--no-epoch-checkpoints", "--no-save-optimizer-state", "--num-workers", "0",
        "--log-format", "json", "--no-progress-bar", *flags,
    ]


def generate_command(binary: Path, checkpoint: Path, flags: Sequence[str]) -> List[str]:
    """Translate the test set."""
    return [
        "fairseq-generate", str(binary), f"--user-dir={PLUGIN}", "--task", "earm_translation", "--cpu",
        f"--path={checkpoint}", "--max-tokens", "4000", "--num-workers", "0", "--no-progress-bar",
        "--scoring", "sacrebleu", "--sacrebleu-tokenizer", "none", *flags,
    ]


def measure_command(binary: Path, checkpoint: Path, output: Path, samples: int, energy_step: str) -> List[str]:
    """Likelihoods, energies and samples of a checkpoint (measure.py)."""
    return [
        "python", str(HERE / "measure.py"), str(binary), str(checkpoint), str(output),
        "--samples", str(samples), "--energy-step", energy_step,
    ]


class Runner:
    """Runs commands, each in its own process and with its own log, and prints them in a form that can be copied.

    Args:
        total: commands to come, for the progress bar.
    """

    def __init__(self, total: int):
        # Read by OpenMP when torch is first imported, in the server: two commands at a time, one thread each.
        os.environ["OMP_NUM_THREADS"] = "1"
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOAD)
        self.bar = tqdm(total=total, unit="command", file=sys.stderr, dynamic_ncols=True)
        self.running = set()
        self.lock = threading.Lock()
        self.stopped = False

    def run(self, command: List[str], log: Path) -> float:
        """Run one command to its end.

        Returns:
            Seconds it took.
        Raises:
            CommandFailed: it failed, or another one had before.
        """
        with self.lock:
            if self.stopped:
                raise CommandFailed("stopped, because another command failed")
            process = self.context.Process(target=execute, args=(command, str(log)))
            started = time.perf_counter()
            process.start()
            self.running.add(process)
            self.bar.write("$ " + shlex.join(command), file=sys.stdout)
        process.join()
        with self.lock:
            self.running.discard(process)
            self.bar.update()
            if process.exitcode != 0 and not self.stopped:
                raise CommandFailed(f"{shlex.join(command)}\nfailed with exit status {process.exitcode}; the end of {log}:\n{tail(log)}")
        return time.perf_counter() - started

    def stop(self) -> None:
        """End the commands that still run."""
        with self.lock:
            self.stopped = True
            for process in self.running:
                process.terminate()
        self.bar.close()


def execute(command: List[str], log: str) -> None:
    """In a forked process: become `command`, its output going to `log`."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if command[0] == "python":
        sys.argv = command[1:]
        module = importlib.import_module(Path(command[1]).stem)
    else:
        sys.argv = command
        module = importlib.import_module(command[0].replace("fairseq-", "fairseq_cli."))
    module.cli_main()


def tail(log: Path, lines: int = 30) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
