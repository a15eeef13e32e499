"""Interrupted training ends as if it had never been interrupted, and bad updates are survived."""
import contextlib
import math
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.models.transformer import TransformerDecoderBase
from fairseq.trainer import Trainer

from fairseq_earm.criterions import training_clock
from tests.tiny_translation import PLUGIN, same_state, train, train_arguments

EARM = ["--criterion", "earm_cross_entropy", "--label-smoothing", 0.1]
# Five updates an epoch; the warm-up spans several, so a stop falls before, into and after it.
SCHEDULE = ["--batch-size", 96, "--earm-start-epoch", 2, "--earm-warmup-updates", 6, "--earm-normalizer-ema", 0.9]
LONG = [*EARM, *SCHEDULE, "--task", "earm_translation"]
END = 12


@pytest.fixture(scope="module")
def uninterrupted(tiny, tmp_path_factory):
    return train(tiny, tmp_path_factory.mktemp("uninterrupted"), *LONG, "--max-update", END).checkpoint()


def earm_state(checkpoint):
    meters = {name: meter["val"] for _, name, _, meter in checkpoint["extra_state"]["metrics"]["earm_state"]}
    return {name: torch.as_tensor(value).tolist() for name, value in meters.items()}


@pytest.mark.parametrize("stop", [3, 7, 10], ids=["before-the-start", "within-an-epoch", "at-the-end-of-an-epoch"])
def test_a_stopped_run_goes_on_as_if_never_stopped(tiny, tmp_path, uninterrupted, stop):
    train(tiny, tmp_path, *LONG, "--max-update", stop)
    resumed = train(tiny, tmp_path, *LONG, "--max-update", END).checkpoint()
    assert same_state(resumed, uninterrupted)
    assert earm_state(resumed) == earm_state(uninterrupted)


@pytest.mark.parametrize("stop", [7, 10])
def test_what_is_asked_to_be_forgotten_is_forgotten(tiny, tmp_path, uninterrupted, stop):
    """Without the state the run ends elsewhere: the tests above would notice its loss."""
    train(tiny, tmp_path, *LONG, "--max-update", stop)
    forgetful = train(tiny, tmp_path, *LONG, "--max-update", END, "--reset-meters").checkpoint()
    assert earm_state(forgetful)["first_update"] == stop
    assert not same_state(forgetful, uninterrupted)


def saved_updates(folder):
    """Numbers of updates after which a checkpoint was saved; fairseq gives it its name when it is complete."""
    return sorted(int(path.stem.split("_")[2]) for path in folder.glob("checkpoint_*_*.pt"))


def kill_after(update, arguments, folder):
    """Train in a process of its own and kill it as soon as a checkpoint of that update or a later one is there."""
    run = [sys.executable, "-c", "from fairseq_cli.train import cli_main; cli_main()", *map(str, arguments)]
    with subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not any(saved >= update for saved in saved_updates(folder)):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(random.random() / 4)  # any moment will do, also while a checkpoint is being written
        process.kill()
        assert process.wait() == -signal.SIGKILL


def test_a_killed_run_goes_on_as_if_never_killed(tiny, tmp_path):
    killed = tmp_path / "killed"
    often = ["--save-interval-updates", 1, "--user-dir", PLUGIN]
    kill_after(8, train_arguments(tiny, killed, *LONG, *often, "--max-epoch", 1000, validate=True), killed)
    path = killed / "checkpoint_last.pt"
    last = checkpoint_utils.load_checkpoint_to_cpu(str(path))["optimizer_history"][-1]["num_updates"]
    end = ["--max-update", last + 3, "--max-epoch", 1000]
    resumed = train(tiny, tmp_path / "resumed", *LONG, *end, "--restore-file", path).checkpoint()
    assert same_state(resumed, train(tiny, tmp_path / "never", *LONG, *end).checkpoint())


class Passes:
    """Which of an update's passes through the decoder is under way."""

    def begin(self, update):
        self.update, self.trained = update, 0

    def next(self, training):
        """data, negatives, or sampling; with several batches in an update, those of the first."""
        self.trained += training
        return ("data", "negatives", "later")[min(self.trained, 3) - 1] if training else "sampling"


@pytest.fixture
def poison(monkeypatch):
    """Have logits be NaN in given updates: those of the data, of the negatives, or those that negatives are drawn from."""
    train_step, output_layer = Trainer.train_step, TransformerDecoderBase.output_layer
    passes, bad = Passes(), set()

    def counted(trainer, *args, **kwargs):
        passes.begin(trainer.get_num_updates())
        return train_step(trainer, *args, **kwargs)

    def poisoned(decoder, features):
        logits = output_layer(decoder, features)
        return logits * math.nan if (passes.update, passes.next(decoder.training)) in bad else logits

    # Before it gives up, fairseq looks for the cause, and its search breaks down over an encoder that returns a dict.
    monkeypatch.setattr("fairseq.trainer.NanDetector", contextlib.nullcontext)
    monkeypatch.setattr(Trainer, "train_step", counted)
    monkeypatch.setattr(TransformerDecoderBase, "output_layer", poisoned)
    return lambda updates, where: bad.update((update, where) for update in updates)


@pytest.mark.parametrize("where, flags", [
    ("data", []),
    ("negatives", []),
    ("data", ["--update-freq", 2]),
    ("negatives", ["--earm-energy-steps", "last"]),
])
def test_an_update_that_is_not_finite_is_skipped(tiny, tmp_path, poison, where, flags):
    poison({2}, where)
    start = ["--earm-start-update", 0, "--earm-normalizer-ema", 0.9, "--save-interval-updates", 1]
    run = train(tiny, tmp_path, *EARM, *start, *flags, "--max-update", 4)
    saved = [run.checkpoint(f"checkpoint_1_{update}.pt") for update in (2, 3, 4)]
    skipped = [line for line in run.warnings() if line.startswith("E-ARM's gradient is not finite")]
    assert same_state(saved[0], saved[1]) and not same_state(saved[1], saved[2])
    counts = [entry.get("earm_skipped_updates", 0) for entry in run.log()]
    assert counts[:2] == [0, 0] and counts[-1] == 1
    assert len(skipped) == 1 and "(1 skipped so far)" in skipped[0]
    assert all(math.isfinite(value) for value in earm_state(saved[2])["log_normalizer"])
    assert all(torch.isfinite(weight).all() for weight in saved[2]["model"].values())
    assert math.isfinite(run.log("train")[0]["train_loss"])


def test_garbage_negatives_stop_nothing(tiny, tmp_path, poison):
    poison({1}, "sampling")
    run = train(tiny, tmp_path, *EARM, "--earm-start-update", 0, "--max-update", 3)
    assert [entry["num_updates"] for entry in run.log()] == [1, 2, 3]
    assert all(math.isfinite(entry["loss"]) for entry in run.log())


def test_where_nothing_but_bad_updates_come_training_stops(tiny, tmp_path, poison, monkeypatch):
    monkeypatch.setattr(training_clock, "MAX_SKIPPED_IN_A_ROW", 2)
    poison(range(1, 99), "data")
    with pytest.raises(FloatingPointError):
        train(tiny, tmp_path, *EARM, "--earm-start-update", 0, "--max-update", 9)


def test_before_its_start_stock_stops_training_as_ever(tiny, tmp_path, poison):
    poison({1}, "data")
    with pytest.raises(FloatingPointError):
        train(tiny, tmp_path, *EARM, "--earm-start-update", 2, "--max-update", 3)
