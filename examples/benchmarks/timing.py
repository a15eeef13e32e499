"""Ratios that a noisy machine cannot spoil: variants in turns, in one process; and the memory that one call takes."""
from __future__ import annotations

import ctypes
import gc
import logging
import math
import multiprocessing
import platform
import statistics
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Sequence

import torch

Variant = Callable[[], object]  # what it returns, if it is a number, is how many things it made


class Cost(NamedTuple):
    """Of one variant.

    Attributes:
        seconds: median over the rounds, see `now`.
        ratio: median over the rounds of its time over the first variant's in the same round; where things are counted, of
            its time for one of them.
        megabytes: most memory held beyond what was held before the call.
        rate: things made per second, median over the rounds; not a number where nothing is counted.
    """

    seconds: float
    ratio: float
    megabytes: float
    rate: float


def compare(variants: Dict[str, Variant], rounds: int = 5) -> Dict[str, Cost]:
    """Time and memory of each variant, beside those of the first.

    The first calls of each, which warm it up, measure its memory; then all run once in each round.
    """
    megabytes = {name: peak_memory(variant) for name, variant in variants.items()}
    seconds: Dict[str, List[float]] = {name: [] for name in variants}
    made: Dict[str, List[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, variant in variants.items():
            time_taken, count = _time(variant)
            seconds[name].append(time_taken)
            made[name].append(math.nan if count is None else count)
    return {name: _cost(seconds, made, name, megabytes[name]) for name in variants}


def _cost(seconds: Dict[str, List[float]], made: Dict[str, List[float]], name: str, megabytes: float) -> Cost:
    rates = {key: [count / time_taken for count, time_taken in zip(made[key], seconds[key])] for key in seconds}
    counted = not math.isnan(sum(map(sum, rates.values())))
    first = next(iter(seconds))
    pairs = zip(rates[first], rates[name]) if counted else zip(seconds[name], seconds[first])
    ratio = statistics.median(above / below for above, below in pairs)
    return Cost(statistics.median(seconds[name]), ratio, megabytes, statistics.median(rates[name]))


def _time(variant: Variant) -> tuple:
    started = now()
    made = variant()
    return now() - started, made


def now() -> float:
    """Seconds, everything done that was asked of the GPU. With one thread those of the processor: other programs count little."""
    synchronise()
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return time.process_time() if alone else time.perf_counter()


def peak_memory(variant: Variant) -> float:
    """MB held at most during a call beyond what was held before it: of the GPU where there is one, else of the process."""
    gc.collect()
    if torch.cuda.is_available():
        synchronise()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        variant()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    variant()  # what a first call keeps for good is not counted
    _map_tensors(2**16)
    Path("/proc/self/clear_refs").write_text("5")  # the process's peak starts anew from what it holds now
    before = _resident("VmRSS")
    variant()
    peak = _resident("VmHWM")
    _map_tensors(2**25)
    return peak - before


def _map_tensors(least: int) -> None:
    """Have glibc give back what is free, and map tensors of so many bytes on their own: what they leave counts no longer."""
    mmap_threshold = -3
    glibc = ctypes.CDLL(None)
    glibc.mallopt(mmap_threshold, least)
    glibc.malloc_trim(0)


def _resident(key: str) -> float:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":")]
    return int(line.split()[1]) / 1024


def in_own_process(function: Callable, *arguments):
    """What a function of a module returns, called in a new process.

    A process that has freed much memory gets it back without page faults, of which training has hundreds of thousands per update.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=_begin, initargs=(torch.get_num_threads(),)) as pool:
        return pool.submit(function, *arguments).result()


def _begin(threads: int) -> None:
    torch.set_num_threads(threads)
    be_quiet()


def be_quiet() -> None:
    """Leave out what fairseq and hydra say and warn of, of each other too."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def synchronise() -> None:
    """Wait for what the GPU still does."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine() -> str:
    """What the figures were taken on."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    cpu = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")] if cpu.exists() else []
    threads = torch.get_num_threads()
    return f"{names[0] if names else platform.processor()}, {threads} thread{'s' * (threads > 1)}, torch {torch.__version__}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
