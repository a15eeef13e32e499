"""Where the time of a call goes, stage by stage."""
from __future__ import annotations

import statistics
from collections import Counter
from typing import Dict, List

from timing import now


class Stages:
    """Seconds that watched methods take, each without the watched ones that it calls.

    On a GPU each stage is waited for at its end, which is a little slower than letting it run on.
    """

    def __init__(self):
        self.calls: List[Counter] = []
        self._open: List[float] = []

    def begin(self) -> None:
        """What comes now is another call."""
        self.calls.append(Counter())

    def watch(self, owner, method: str, stage: str) -> None:
        """Count the seconds of `owner.method` for a stage, from the next call of `begin` on."""
        inner = getattr(owner, method)

        def watched(*args, **kwargs):
            started = now()
            self._open.append(0.0)
            try:
                return inner(*args, **kwargs)
            finally:
                seconds = now() - started
                self.calls[-1][stage] += seconds - self._open.pop()
                if self._open:
                    self._open[-1] += seconds

        setattr(owner, method, watched)

    def medians(self, last: int) -> Dict[str, float]:
        """Seconds of each stage, medians over the last so many calls."""
        calls = self.calls[-last:]
        return {stage: statistics.median(call[stage] for call in calls) for stage in calls[-1]}
