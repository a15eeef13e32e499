"""One normaliser for the negatives of all workers, and nobody who waits for a worker that has none."""
from __future__ import annotations

import functools
from typing import Callable

import torch
from fairseq.distributed import utils as distributed

from fairseq_earm.ebm.weights import StepStatistics, join_statistics, no_statistics


class AllWorkers:
    """Joins the statistics of the workers' batches, once in each `task.train_step`.

    A worker may have a batch that does not count, may skip it, or lose it to an error. So that nobody waits for it, a
    step that ends or fails before the criterion came to `join`, or within it, takes part with statistics of nothing.
    Who joins outside of a training step, or a second time in one, is alone; so is the one worker of a run.

    Args:
        task: its `train_step` is watched.
        active: whether the step under way joins statistics; the same on all workers.
        heard: called on every worker with what was joined.
    """

    def __init__(self, task, active: Callable[[], bool], heard: Callable[[StepStatistics], None]):
        self.active = active
        self.heard = heard
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

    def join(self, own: StepStatistics) -> StepStatistics:
        """(1, T') statistics of all workers' batches, of as many steps as the longest has, given this worker's (1, T)."""
        if self.awaited:
            everyone = self._join_all(own)
        elif distributed.get_data_parallel_world_size() > 1:
            return own
        else:
            everyone = own
        self.heard(everyone)
        return everyone

    def _join_with_nothing(self) -> None:
        if self.awaited and self.active():
            self.join(no_statistics(1))
        self.awaited = False

    def _join_all(self, own: StepStatistics) -> StepStatistics:
        """Two collectives: the number of steps, and the statistics themselves. Who was at the first comes to the second."""
        group = distributed.get_data_parallel_group()
        device = "cuda" if torch.distributed.get_backend(group) == "nccl" else "cpu"
        steps = torch.tensor([own.data.size(1)], device=device)
        self.awaited = False
        steps = int(distributed.all_reduce(steps, group, op="max"))
        try:
            padded = torch.stack(own.up_to(steps)).to(device)
        except Exception:  # such as too little memory
            self.heard(_gather(torch.stack(no_statistics(steps)).to(device), group, own.data.device))
            raise
        return _gather(padded, group, own.data.device)


def _gather(own: torch.Tensor, group, device) -> StepStatistics:
    """(1, T) statistics of all workers, from (4, 1, T) of each."""
    everyone = distributed.all_gather(own, group, return_tensor=True).squeeze(2).to(device)
    return join_statistics(StepStatistics(*everyone.unbind(1)))
