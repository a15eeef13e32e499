"""An energy network on the tiny text."""
import torch

from tests.tiny_translation import OPTIMISATION, command

PREFIX, LENGTH = 8, 12
LENGTHS = ["--prefix-length", PREFIX, "--sequence-length", LENGTH]
TASK = ["--task", "residual_language_modeling", *LENGTHS]
SIZES = "--encoder-layers 1 --encoder-embed-dim 16 --encoder-ffn-embed-dim 32 --encoder-attention-heads 2".split()


def build_energy(text, folder, strength=20):
    """Train an energy network on the residual of `text.base` by stock commands; made stronger, it tells from no energy."""
    arguments = [*TASK, "--criterion", "residual_nce", "--base-lm", text.base, "--arch", "bit_tiny", *SIZES, *OPTIMISATION]
    command("train", text.data, *arguments, "--lr", 0.003, "--save-dir", folder, "--disable-validation")
    state = torch.load(folder / "checkpoint_last.pt", map_location="cpu", weights_only=False)
    state["model"]["energy_projection.weight"].mul_(strength)
    torch.save(state, folder / "strong.pt")
    return folder / "strong.pt"
