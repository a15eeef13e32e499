"""fairseq makes batches ahead in a thread that nobody ends: Python would, in the midst of an operation of torch."""
from __future__ import annotations

import atexit
import contextlib
import queue
import threading
import time

PATIENCE = 5.0  # seconds for the batch that is being made


def end_batch_threads() -> None:
    """A run that stops within an epoch, as at `--max-update`, could abort (exit code 134) after its work was done."""
    atexit.unregister(_end_batch_threads)
    atexit.register(_end_batch_threads)


def _end_batch_threads() -> None:
    from fairseq.data.iterators import BackgroundConsumer

    deadline = time.monotonic() + PATIENCE
    threads = [thread for thread in threading.enumerate() if isinstance(thread, BackgroundConsumer)]
    for thread in threads:
        thread._max_len = 0  # it ends after the batch it is at
    for thread in threads:
        while thread.is_alive() and time.monotonic() < deadline:
            with contextlib.suppress(queue.Empty):
                thread._queue.get(timeout=0.01)  # it may be waiting for room
