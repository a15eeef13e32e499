"""One normaliser for the negatives of all workers; no worker blocks on one that has no batch."""

from __future__ import annotations

import functools
import math
from typing import Callable

import torch
from fairseq.distributed import utils as distributed

from fairseq_earm.ebm.weights import StepStatistics, join_statistics


class AllWorkers:
    """Joins the statistics of the workers' batches, once in each `task.train_step`.

    A worker may have a batch that does not count, may skip it, or lose it to an error. So that nobody waits for it, a
    step that ends or fails before the criterion came to `join`, or within it, takes part with statistics of nothing.
    Outside a training step, or on a second call within one, `join` uses only this worker's statistics.

    Args:
        task: its `train_step` is watched.
        active: whether the step under way joins statistics; the same on all workers.
        heard: called on every worker with what was joined.
        nothing: from a number of steps to the statistics of a batch of nothing.
    """

    def __init__(
        self,
        task,
        active: Callable[[], bool],
        heard: Callable[[StepStatistics], None],
        nothing: Callable[[int], StepStatistics],
    ):
        self.active = active
        self.heard = heard
        self.nothing = nothing
        self.awaited = False  # by the others, in this step
        step = task.train_step

        @functools.wraps(step)
        def train_step(*args, **kwargs):
            self.awaited = distributed.get_data_parallel_world_size() > 1
            try:
                result = step(*args, **kwargs)
            except (Exception, SystemExit):  # a UsageError is the latter
                self._join_with_nothing()
                raise
            self._join_with_nothing()
            return result

        task.train_step = train_step

    def join(self, steps: int, own: Callable[[int], StepStatistics]) -> StepStatistics:
        """Statistics of all workers' batches.

        Args:
            steps: of this worker's batch.
            own: from the number of steps of the longest batch of all workers to the statistics of this worker's.
        """
        if self.awaited:
            everyone = self._join_all(steps, own)
        elif distributed.get_data_parallel_world_size() > 1:
            return own(steps)
        else:
            everyone = own(steps)
        self.heard(everyone)
        return everyone

    def _join_with_nothing(self) -> None:
        if self.awaited and self.active():
            self.join(1, self.nothing)
        self.awaited = False

    def _join_all(self, steps: int, own: Callable[[int], StepStatistics]) -> StepStatistics:
        """Two collectives: the number of steps, then the statistics. A worker in the first is in the second."""
        group = distributed.get_data_parallel_group()
        device = "cuda" if torch.distributed.get_backend(group) == "nccl" else "cpu"
        longest = torch.tensor([steps], device=device)
        self.awaited = False
        longest = int(distributed.all_reduce(longest, group, op="max"))
        try:
            mine = own(longest)
        except Exception:  # such as too little memory
            self.heard(_gather(self.nothing(longest), group, device))
            raise
        return _gather(mine, group, device)


def _gather(own: StepStatistics, group, device) -> StepStatistics:
    """Statistics of all workers, whose own ones are all of the same shapes."""
    shapes = [each.shape for each in own]
    flat = torch.cat([each.flatten() for each in own]).to(device)
    everyone = distributed.all_gather(flat, group, return_tensor=True).to(own.data.device)
    parts = everyone.split([math.prod(shape) for shape in shapes], dim=1)
    return join_statistics(StepStatistics(*(part.reshape(len(part), *shape[1:]) for part, shape in zip(parts, shapes))))
