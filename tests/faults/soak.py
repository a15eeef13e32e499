"""E-ARM training on real data for hours, watched from outside: does its memory grow, do files or threads leak?

    python tests/faults/soak.py run DATA FOLDER --minutes 120      trains, and samples /proc every ten seconds (Linux)
    python tests/faults/soak.py report FOLDER                      figures, verdict and plot; also while it runs

DATA is what fairseq-preprocess wrote about two languages, FOLDER new. `report` ends with status 1 where something leaks.
"""
from __future__ import annotations

import argparse
import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable, List, NamedTuple, Sequence

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = (
    "--task translation --arch transformer_iwslt_de_en --encoder-layers 2 --decoder-layers 2 --encoder-embed-dim 128 "
    "--decoder-embed-dim 128 --encoder-ffn-embed-dim 512 --decoder-ffn-embed-dim 512 --encoder-attention-heads 4 "
    "--decoder-attention-heads 4 --share-all-embeddings --dropout 0.2"
).split()
# A checkpoint every 100 updates and validation every epoch: what leaks there would show as well.
TRAINING = (
    "--criterion earm_cross_entropy --label-smoothing 0.1 --earm-weight 0.05 --earm-start-update 0 --earm-normalizer-ema 0.9 "
    "--optimizer adam --clip-norm 1.0 --lr 3e-4 --lr-scheduler fixed --max-tokens 2560 --required-batch-size-multiple 1 "
    "--save-interval-updates 100 --keep-interval-updates 2 --keep-last-epochs 1 --num-workers 1 --seed 1 --cpu "
    "--no-progress-bar --log-format json --log-interval 20"
).split()
MEGABYTE = 2**20
MEMORY = {"rss": "training process", "peak": "most of it since the last sample", "private": "with its children, without libraries"}
# How much there is in a window. What is never given back is held at the least too, which is the same whatever batch is under
# way; a median tells also which part of an update takes longest, and that changes with what else the machine does.
LEVELS = {"rss": np.min, "private": np.min}  # of the others the median: single files from the loader's process come and go


class Series(NamedTuple):
    """One quantity of a run after its first minutes.

    Attributes:
        first, last: its level in the first and in the last window.
        growth: from the first to the last window, in percent.
        trend: of a straight line through all windows, over the same time, in percent.
    """

    first: float
    last: float
    growth: float
    trend: float


def tree(pid: int) -> List[int]:
    """A process and all that descend from it."""
    found = [pid]
    for known in found:  # grows meanwhile
        for children in Path(f"/proc/{known}/task").glob("*/children"):
            found += map(int, children.read_text().split())
    return found


def kilobytes(path: str, name: str) -> int:
    """The figure of one line of a file in /proc."""
    return next(int(line.split()[1]) for line in Path(path).read_text().splitlines() if line.startswith(f"{name}:"))


def sample(pid: int, log: Path) -> dict:
    """What a training process and its children hold now.

    In bytes: `rss` is the process's own resident memory, `peak` the most of it since the last sample; `private` that of all
    processes without files and libraries, which may be shared with other programs.
    """
    updates = log.read_bytes()[-4096:].decode(errors="replace").rpartition('"num_updates": "')[2].partition('"')[0]
    rss, peak = (1024 * kilobytes(f"/proc/{pid}/status", name) for name in ("VmRSS", "VmHWM"))
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak begins anew
    held = {"rss": rss, "peak": peak, "private": 0, "files": 0, "threads": 0, "processes": 0}
    for process in tree(pid):
        try:
            held["private"] += 1024 * sum(kilobytes(f"/proc/{process}/smaps_rollup", name) for name in ("Pss_Anon", "Pss_Shmem"))
            held["files"] += len(list(Path(f"/proc/{process}/fd").iterdir()))
            held["threads"] += len(list(Path(f"/proc/{process}/task").iterdir()))
            held["processes"] += 1
        except (OSError, StopIteration):
            if process == pid:
                raise
    return {**held, "updates": int(updates) if updates.isdigit() else 0}


def run(args: argparse.Namespace) -> None:
    """Train for so many minutes; one line of JSON for each sample, written as it is taken."""
    if not list(args.data.glob("dict.*.txt")):
        raise SystemExit(f"{args.data}: give a folder that fairseq-preprocess wrote about two languages")
    args.folder.mkdir(parents=True)
    words = [sys.executable, "-c", "from fairseq_cli.train import cli_main; cli_main()", str(args.data)]
    words += ["--user-dir", str(REPOSITORY / "fairseq_earm"), "--save-dir", str(args.folder / "checkpoints"), *MODEL, *TRAINING]
    words += ["--finetune-from-model", str(args.start)] if args.start else []
    words += shlex.split(args.flags)
    log = args.folder / "train.log"
    (args.folder / "command.txt").write_text(shlex.join(words) + "\n")
    with log.open("w") as output, (args.folder / "samples.jsonl").open("w") as samples:
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT)
        begun = time.monotonic()
        while process.poll() is None and time.monotonic() - begun < 60 * args.minutes:
            try:
                held = sample(process.pid, log)
            except (OSError, StopIteration):  # it has just ended
                break
            samples.write(json.dumps({"seconds": round(time.monotonic() - begun, 1), **held}) + "\n")
            samples.flush()
            time.sleep(args.every)
        ended_early = process.poll() is not None
        process.terminate()
        if process.wait() != -signal.SIGTERM or ended_early:
            raise SystemExit(f"training ended by itself, with status {process.returncode}; see {log}")


def levels(minutes: np.ndarray, values: np.ndarray, window: float, level: Callable) -> np.ndarray:
    """(W, 2) middle of each window, and its values' level; a last window that is not full joins the one before."""
    number = np.minimum((minutes - minutes[0]) // window, max((minutes[-1] - minutes[0]) // window - 1, 0))
    return np.array([[minutes[number == w].mean(), level(values[number == w])] for w in np.unique(number)])


def series(minutes: np.ndarray, values: np.ndarray, window: float, level: Callable) -> Series:
    """How a quantity went from window to window."""
    times, found = levels(minutes, values, window, level).T
    slope = np.polyfit(times, found, 1)[0] if len(times) > 1 else 0.0
    first, last = found[0], found[-1]
    return Series(first, last, 100 * (last - first) / first, 100 * slope * (times[-1] - times[0]) / first)


def report(args: argparse.Namespace) -> bool:
    """Print the figures, draw them where matplotlib is installed; whether nothing leaks."""
    samples = [json.loads(line) for line in (args.folder / "samples.jsonl").read_text().splitlines() if line.endswith("}")]
    minutes = running_minutes(samples)
    settled = [line for line, minute in zip(samples, minutes) if minute >= args.after]
    if len(settled) < 2:
        raise SystemExit(f"{args.folder}: nothing measured after minute {args.after:g} yet")
    stopped = settled[-1]["seconds"] / 60 - minutes[-1]
    print(
        f"{minutes[-1]:.0f} minutes" + (f" (and {stopped:.0f} in which the machine stood still)" if stopped >= 1 else "")
        + f", {settled[-1]['updates']:,} updates, {len(samples):,} samples; windows of {args.window:g} minutes "
        f"after minute {args.after:g}, their least rss and private, the others' medians:"
    )
    print(f"{'':<18} {'first':>8} {'last':>8} {'growth':>9} {'trend':>9}")
    sound = True
    for name in ("rss", "peak", "private", "files", "threads", "processes"):
        unit, limit = (MEGABYTE, args.limit) if name in MEMORY else (1, 0)
        values = np.array([line[name] for line in settled]) / unit
        found = series(minutes[-len(settled) :], values, args.window, LEVELS.get(name, np.median))
        leaks = min(found.growth, found.trend) > limit
        sound = sound and not leaks
        label = f"{name}, MiB" if name in MEMORY else name
        row = f"{label:<18} {found.first:8.1f} {found.last:8.1f} {found.growth:+8.2f}% {found.trend:+8.2f}%"
        print(row + (f"  LEAKS (limit {limit:g}%)" if leaks else ""))
    _plot(samples, minutes, args.folder / "soak.png")
    return sound


def running_minutes(samples: Sequence[dict]) -> np.ndarray:
    """(S,) minutes at which samples were taken, without those in which nothing was: then the machine, or all on it, stood still."""
    gaps = np.diff([line["seconds"] for line in samples], prepend=0)
    return np.minimum(gaps, 3 * np.median(gaps)).cumsum() / 60 if len(gaps) else gaps


def _plot(samples: Sequence[dict], minutes: np.ndarray, path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (memory, counts) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 5), constrained_layout=True)
    for name, label in MEMORY.items():
        memory.plot(minutes, [line[name] / MEGABYTE for line in samples], label=label, linewidth=0.8)
    for name in ("files", "threads", "processes"):
        counts.plot(minutes, [line[name] for line in samples], label=name, linewidth=0.8)
    memory.set(ylabel="MiB", ylim=(0, None), title="E-ARM training, watched from outside")
    counts.set(xlabel="minutes", ylim=(0, None))
    memory.legend(loc="lower right")
    counts.legend(loc="center right")
    figure.savefig(path, dpi=120)
    print(f"drawn: {path}")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = made.add_subparsers(required=True, dest="command")
    train = commands.add_parser("run")
    train.add_argument("data", type=Path)
    train.add_argument("folder", type=Path)
    train.add_argument("--minutes", type=float, default=120)
    train.add_argument("--every", type=float, default=10, metavar="SECONDS", help="between samples")
    train.add_argument("--start", type=Path, metavar="CHECKPOINT", help="of the same shape; by default a model made afresh")
    train.add_argument("--flags", default="", help="further flags of fairseq-train, in one word")
    table = commands.add_parser("report")
    table.add_argument("folder", type=Path)
    table.add_argument("--after", type=float, default=10, metavar="MINUTES", help="what came before does not count")
    table.add_argument("--window", type=float, default=10, metavar="MINUTES", help="that are compared: an epoch at least")
    table.add_argument("--limit", type=float, default=2, metavar="PERCENT", help="by which memory may grow")
    return made


if __name__ == "__main__":
    arguments = parser().parse_args()
    if arguments.command == "run":
        run(arguments)
    else:
        sys.exit(0 if report(arguments) else 1)
