"""Objectives, controls and every N-th update through `fairseq-train`: logged, resumed, read from version 0.1."""

import pytest
import torch

from fairseq_earm.errors import UsageError
from tests.test_training import EARM, FROM_THE_FIRST, KEYS, earm_keys, is_sound
from tests.tiny_translation import command, same_state, train

WAYS = {
    "--earm-control noise": KEYS,
    "--earm-control flat --earm-control-weight 0.5": {"earm_loss"},
    "--earm-control likelihood --earm-dropout off": {"earm_loss"},
    "--earm-objective nce": KEYS,
    "--earm-cross-entropy replace --earm-weight 1": KEYS,
    "--earm-dropout off": KEYS,
    "--earm-dropout energy-off": KEYS,
}


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """One run of each way, and one of E-ARM's defaults."""
    return {way: train(tiny, tmp_path_factory.mktemp("run"), *FROM_THE_FIRST, *way.split()) for way in ["", *WAYS]}


@pytest.mark.parametrize("way", WAYS)
def test_each_trains_in_its_own_way(runs, way):
    assert is_sound(runs[way], 3)
    assert [earm_keys(entry) for entry in runs[way].log()] == [WAYS[way]] * 3
    assert not any(same_state(runs[way].checkpoint(), run.checkpoint()) for other, run in runs.items() if other != way)


# Five updates an epoch; a stop falls on an update with E-ARM and on one without, and within an accumulation of batches.
EVERY = [
    "--batch-size",
    48,
    "--update-freq",
    2,
    "--earm-start-epoch",
    2,
    "--earm-every",
    2,
    "--earm-normalizer-ema",
    0.9,
]
EVERY += ["--earm-warmup-updates", 6, "--earm-dropout", "off", "--task", "earm_translation"]


@pytest.mark.parametrize("stop", [6, 7])
def test_every_second_update_goes_on_as_if_never_stopped(tiny, tmp_path, stop):
    whole = train(tiny, tmp_path / "whole", *EARM, *EVERY, "--max-update", 10)
    used = [entry["num_updates"] for entry in whole.log() if earm_keys(entry)]
    assert used == [7, 9]  # the updates that follow on 6 and 8; the second epoch begins after 5
    assert all({"earm_gnorm", "earm_clip"} <= entry.keys() for entry in whole.log() if entry["num_updates"] in used)
    train(tiny, tmp_path / "stopped", *EARM, *EVERY, "--max-update", stop)
    resumed = train(tiny, tmp_path / "stopped", *EARM, *EVERY, "--max-update", 10)
    assert same_state(resumed.checkpoint(), whole.checkpoint())


def of_version_0_1(path, control: bool):
    """Make a checkpoint what version 0.1 would have saved: a flag of True or False, and none of today's others."""
    state = torch.load(path, weights_only=False)
    criterion = state["cfg"]["criterion"]
    for name in (
        "earm_every",
        "earm_objective",
        "earm_cross_entropy",
        "earm_dropout",
        "earm_control_weight",
        "clip_norm",
    ):
        del criterion[name]
    criterion["earm_control"], criterion["earm_variance_reduction"] = control, "rao-blackwell"
    torch.save(state, path)


@pytest.mark.parametrize("control", [True, False])
def test_a_control_of_version_0_1_is_validated_and_resumed(tiny, tmp_path, control):
    flags = ["--earm-control"] if control else []
    older = [*EARM, "--earm-start-update", 0, "--earm-variance-reduction", "rao-blackwell", *flags]
    whole = train(tiny, tmp_path / "whole", *older, "--max-update", 4)
    train(tiny, tmp_path / "old", *older, "--max-update", 2)
    saved = tmp_path / "old" / "checkpoint_last.pt"
    of_version_0_1(saved, control)
    command(
        "validate",
        tiny.data,
        "--path",
        saved,
        "--task",
        "translation",
        "--valid-subset",
        "valid",
        "--batch-size",
        8,
        "--cpu",
    )
    resumed = train(tiny, tmp_path / "old", *older, "--max-update", 4)
    assert same_state(resumed.checkpoint(), whole.checkpoint())
    keys = {"earm_loss"} if control else KEYS
    assert [earm_keys(entry) for entry in resumed.log()][-2:] == [keys] * 2


def test_a_folder_behind_the_bare_flag_is_not_taken_for_a_control(tiny, tmp_path):
    with pytest.raises(UsageError, match="--earm-control data-bin: give one of likelihood, noise, flat"):
        train(tiny, tmp_path, *FROM_THE_FIRST, "--earm-control", "data-bin")
