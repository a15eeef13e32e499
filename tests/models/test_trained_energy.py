"""An energy network's life in stock commands: started from a checkpoint, trained, saved, gone on with, loaded."""
import shutil

import pytest
import torch
from fairseq import checkpoint_utils

from fairseq_earm.errors import UsageError
from tests.models.commands import train
from tests.models.networks import sequences

TASK = (
    "--task residual_language_modeling --criterion residual_nce --prefix-length 4 --sequence-length 8 --disable-validation "
    "--max-update 2"
).split()
ARCHS = {
    "unit": "--arch unit_tiny --decoder-layers 2 --decoder-embed-dim 16 --decoder-ffn-embed-dim 32 --decoder-attention-heads 2",
    "bit": "--arch bit_tiny --encoder-layers 2 --encoder-embed-dim 16 --encoder-ffn-embed-dim 32 --encoder-attention-heads 2 "
    "--max-positions 12",
}


@pytest.mark.parametrize("name, source", [("unit", "lm"), ("bit", "mlm")])
def test_the_initial_checkpoint_is_needed_once(name, source, text, tmp_path):
    initial, folder = tmp_path / "initial.pt", tmp_path / "energy"
    shutil.copy(getattr(text, source), initial)
    run = [text.data, folder, *TASK, *ARCHS[name].split(), "--base-lm", text.lm]
    path = train(*run, "--energy-init", initial)
    initial.unlink()
    model = checkpoint_utils.load_model_ensemble_and_task([str(path)])[0][0].eval()
    energies = model(sequences(8, 5))
    assert energies.shape == (2,) and energies.dtype == torch.float32
    train(*run, "--max-update", 3)
    state = torch.load(path, weights_only=False)
    assert state["optimizer_history"][-1]["num_updates"] == 3
    assert {key.split(".")[0] for key in state["model"]} == {"trunk", "energy_projection"}


def test_a_missing_initial_checkpoint_stops_before_training(text, tmp_path):
    run = [text.data, tmp_path, *TASK, *ARCHS["unit"].split(), "--base-lm", text.lm]
    with pytest.raises(UsageError, match="--energy-init .*nothing.pt: there is no such file"):
        train(*run, "--energy-init", tmp_path / "nothing.pt")
    assert not list(tmp_path.glob("*.pt"))
