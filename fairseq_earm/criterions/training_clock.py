"""What a criterion needs to know of the training run that fairseq does not tell it.

fairseq hands epoch and update number to the task, not to the criterion. So that any task will do, the two calls that
carry them are observed on the task's instance.
"""
from __future__ import annotations

import functools
import inspect
import logging
from typing import Callable

import torch

from fairseq_earm.meter_state import MeterState

logger = logging.getLogger(__name__)

# As many updates in a row without a finite gradient are no accident: training stops, as fairseq's would.
MAX_SKIPPED_IN_A_ROW = 25


def observe(owner, method: str, callback: Callable) -> None:
    """Have `callback` called with the named arguments of each call of `owner.method`, before it."""
    inner = getattr(owner, method)
    signature = inspect.signature(inner)

    @functools.wraps(inner)
    def observed(*args, **kwargs):
        callback(**signature.bind(*args, **kwargs).arguments)
        return inner(*args, **kwargs)

    setattr(owner, method, observed)


class TrainingClock:
    """Where training is, as the trainer tells the task.

    Attributes:
        epoch: counted from 1.
        num_updates: updates done.
        dummy: whether the batch at hand stands in for one that this worker has none of: its gradient is not used.
    """

    def __init__(self, task):
        self.epoch = 1
        self.num_updates = 0
        self.dummy = False
        observe(task, "begin_epoch", self._on_epoch)
        observe(task, "train_step", self._on_step)

    def _on_epoch(self, epoch, **unused) -> None:
        self.epoch = epoch

    def _on_step(self, update_num, ignore_grad=False, **unused) -> None:
        self.num_updates = update_num
        self.dummy = bool(ignore_grad)


class EarmSchedule:
    """λ at the present update: 0 before E-ARM's start, then a linear warm-up to `earm_weight`.

    With `earm_every` N it is N times as much in every N-th update, and 0 in the others.
    """

    def __init__(self, cfg, clock: TrainingClock, state: MeterState):
        self.weight = cfg.earm_weight
        self.start_epoch = cfg.earm_start_epoch
        self.start_update = cfg.earm_start_update
        self.warmup = cfg.earm_warmup_updates
        self.every = cfg.earm_every
        self.clock = clock
        self.state = state
        start = f"update {self.start_update}" if self.start_update >= 0 else f"epoch {self.start_epoch}"
        if self.weight > 0:
            logger.info(f"E-ARM starts at {start}, if training gets there; cross-entropy alone until then")

    def current_weight(self) -> float:
        """λ for the update under way."""
        if self.weight == 0:
            return 0.0
        if not self._started():
            self._forget_start()
            return 0.0
        grown = 1.0 if self.warmup == 0 else min(1.0, (self.clock.num_updates - self._first_update() + 1) / self.warmup)
        if self.clock.num_updates % self.every:
            return 0.0
        return self.weight * grown * self.every

    def _started(self) -> bool:
        if self.start_update >= 0:
            return self.clock.num_updates >= self.start_update
        return self.clock.epoch >= self.start_epoch

    def _first_update(self) -> int:
        if self.start_update >= 0:
            return self.start_update
        first = self.state.get("first_update")
        if first is None or not 0 <= first <= self.clock.num_updates:
            first = self.clock.num_updates
            self.state.set("first_update", first)
        return int(first)

    def _forget_start(self) -> None:
        """A checkpoint may bring the start of another run, whose updates or epochs this one does not count on."""
        if self.state.get("first_update") is not None:
            self.state.set("first_update", -1)


def watch_gradient(task, judge: Callable, *, scaled: bool = False) -> None:
    """Have `judge(norm, optimizer)` say what goes on as the norm of a gradient, which all workers have by then.

    Args:
        scaled: also watch optimizers with a loss scaler, which refuse a gradient that is not finite by themselves.
    """
    watched = None

    def on_step(optimizer, **unused) -> None:
        nonlocal watched
        if optimizer is not watched and (scaled or getattr(optimizer, "scaler", None) is None):
            watched = optimizer
            clip = optimizer.clip_grad_norm
            optimizer.clip_grad_norm = lambda *args, **kwargs: judge(torch.as_tensor(clip(*args, **kwargs)), optimizer)

    observe(task, "train_step", on_step)


class NonfiniteGuard:
    """Skips updates whose gradient is not finite, as fairseq does in half precision, where it would stop in float32.

    The gradient is judged after it was reduced over the workers, so all of them skip together. In half precision and
    under --amp fairseq's own loss scaler does this, and is left to it.

    Args:
        task: its `train_step` and `optimizer_step` are watched.
        active: whether the update under way is guarded, as those with E-ARM are; the same on all workers.
        state: where skipped updates are counted.
    """

    def __init__(self, task, active: Callable[[], bool], state: MeterState):
        self.active = active
        self.state = state
        self.skipping = False
        self.in_a_row = 0
        watch_gradient(task, self._judge)
        self._step = task.optimizer_step
        task.optimizer_step = self._optimizer_step

    def _judge(self, norm: torch.Tensor, optimizer) -> torch.Tensor:
        self.skipping = self.active() and not bool(torch.isfinite(norm).all())
        self.in_a_row = self.in_a_row + 1 if self.skipping else 0
        if not self.skipping or self.in_a_row > MAX_SKIPPED_IN_A_ROW:
            return norm
        optimizer.zero_grad()
        skipped = int(self.state.get("skipped_updates", 0)) + 1
        self.state.set("skipped_updates", skipped)
        logger.warning(f"E-ARM's gradient is not finite: update skipped ({skipped} skipped so far)")
        return torch.zeros_like(norm)

    def _optimizer_step(self, *args, **kwargs) -> None:
        if not self.skipping:
            self._step(*args, **kwargs)
        self.skipping = False
