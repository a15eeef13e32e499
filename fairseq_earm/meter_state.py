"""State of training that survives a resume in a plain checkpoint."""
from __future__ import annotations

import functools
import inspect

from fairseq.logging import metrics
from fairseq.trainer import Trainer


class MeterState:
    """State that survives a resume and keeps the checkpoint plain.

    fairseq saves and restores all metrics aggregators, and criterions only if they have parameters (which DDP then
    refuses). An aggregator of our own, never displayed, with stock meters: any fairseq loads it.
    """

    aggregator = "earm_state"

    def get(self, key: str, default=None):
        """The value last set, also before a resume."""
        meter = metrics.get_meter(self.aggregator, key)
        return default if meter is None or meter.val is None else meter.val

    def set(self, key: str, value) -> None:
        """Keep a number or a tensor."""
        with metrics.aggregate(self.aggregator, new_root=True):
            metrics.log_scalar(key, value, weight=0)


def restore_state_at_epoch_ends() -> None:
    """Have a resume restore `MeterState` also from a checkpoint that was saved at the end of an epoch.

    fairseq leaves the metrics of such a checkpoint unread, because its own averages begin anew with each epoch.
    """
    load = Trainer.load_checkpoint
    if getattr(load, "restores_earm_state", False):
        return
    signature = inspect.signature(load)

    @functools.wraps(load)
    def load_checkpoint(*args, **kwargs):
        extra_state = load(*args, **kwargs)
        reset = signature.bind(*args, **kwargs).arguments.get("reset_meters", False)
        saved = dict((extra_state or {}).get("metrics", {}))
        if MeterState.aggregator in saved and not reset:
            metrics.load_state_dict({MeterState.aggregator: saved[MeterState.aggregator]})
        return extra_state

    load_checkpoint.restores_earm_state = True
    Trainer.load_checkpoint = load_checkpoint
