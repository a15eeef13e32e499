"""Tiny training runs with all the logs that fairseq can write."""
import logging
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from fairseq.logging import progress_bar

from tests.tiny_translation import train

FLAGS = ["--task", "earm_translation", "--criterion", "earm_cross_entropy", "--label-smoothing", 0.1, "--earm-start-epoch", 2]
FLAGS += ["--earm-weight", 0.05, "--valid-subset", "valid,test", "--log-interval", 4]


class Logged(NamedTuple):
    """One run's folder and what it logged: its output as text and as JSON, `--log-file` (JSON) and TensorBoard's files."""

    folder: Path
    simple: Path
    json: Path
    log_file: Path
    events: Path


def build(tiny, folder):
    """Train three epochs, E-ARM from the second on, once with each text format; the same numbers come out."""
    run = Logged(folder / "run", folder / "simple.log", folder / "json.log", folder / "file.log", folder / "events")
    handlers = list(progress_bar.logger.handlers)
    with mock.patch.dict(progress_bar._tensorboard_writers, clear=True):
        _train(tiny, run.folder, run.json, "json", "--log-file", run.log_file, "--tensorboard-logdir", run.events)
        _train(tiny, folder / "again", run.simple, "simple")
    for logger in (progress_bar.logger, logging.getLogger()):
        for handler in [h for h in logger.handlers if isinstance(h, logging.FileHandler) and h not in handlers]:
            logger.removeHandler(handler)
            handler.close()
    return run


def _train(tiny, folder, log, log_format, *more):
    trained = train(tiny, folder, *FLAGS, "--max-epoch", 3, "--log-format", log_format, *more, validate=True)
    lines = [f"2025-01-01 10:00:00 | {r.levelname} | {r.name} | {r.getMessage()}\n" for r in trained.records]
    log.write_text("".join(lines))
