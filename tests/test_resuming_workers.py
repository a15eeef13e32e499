"""Several workers that stopped and went on end as if they never had stopped, bit for bit."""
import torch

from tests.tasks.test_residual_language_modeling import BIT, LENGTHS
from tests.test_distributed import WORKERS, moving_normalizer, run_workers
from tests.test_resuming import EARM
from tests.tiny_translation import ARCH, same_state, train_arguments, used_weights

# Three updates an epoch of a batch each, the last one with nothing for the second worker.
EPOCHS = ["--batch-size", 96, "--required-batch-size-multiple", 1, "--max-epoch", 9, "--ddp-backend", "legacy_ddp", *WORKERS]
MOVING = ["--task", "earm_translation", *EARM, *EPOCHS, "--earm-start-update", 1, "--earm-warmup-updates", 4, "--earm-normalizer-ema", 0.9]
RESIDUAL = ["--task", "residual_language_modeling", "--criterion", "residual_nce", *LENGTHS, "--lr", 0.001, *EPOCHS, "--batch-size", 32]
END = 5


def train_in_parts(data, folder, stops, *flags, arch=ARCH):
    """The last checkpoint of two workers who stop after each of these updates, and went on after all but the last."""
    folder.mkdir()
    for stop in stops:
        run_workers(folder, train_arguments(data, folder / "out", *flags, "--max-update", stop, arch=arch))
    checkpoint = torch.load(folder / "out" / "checkpoint_last.pt", weights_only=False)
    assert checkpoint["optimizer_history"][-1]["num_updates"] == stops[-1]
    for rank in (0, 1):
        weights = torch.load(folder / f"{rank}.pt", weights_only=False)["weights"]
        assert all(torch.equal(weight, weights[name]) for name, weight in used_weights(checkpoint["model"]).items())
    return checkpoint


def test_workers_that_stop_go_on_as_if_they_never_had(tiny, tmp_path):
    """Within an epoch and at the end of one; negatives, warm-up and moving normaliser included."""
    whole = train_in_parts(tiny, tmp_path / "whole", [END], *MOVING)
    stopped = train_in_parts(tiny, tmp_path / "stopped", [2, 3, END], *MOVING)
    assert same_state(stopped, whole)
    assert torch.equal(moving_normalizer(stopped), moving_normalizer(whole))


def test_workers_on_a_residual_that_stop_go_on_as_if_they_never_had(text, tmp_path):
    flags = [*RESIDUAL, "--base-lm", text.base]
    whole = train_in_parts(text, tmp_path / "whole", [END], *flags, arch=BIT)
    assert same_state(train_in_parts(text, tmp_path / "stopped", [2, END], *flags, arch=BIT), whole)
