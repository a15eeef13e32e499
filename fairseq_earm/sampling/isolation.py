"""Sampling inside a training step must leave no trace in it."""
from __future__ import annotations

from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn


@contextmanager
def isolated(model: nn.Module, device: torch.device):
    """Run sampling code without gradients, in eval mode, on random numbers of its own.

    Restored afterwards, exactly: every submodule's train/eval mode (fairseq's `SequenceGenerator` calls `model.eval()`),
    the decoder's beam size (an earlier generator may have left one that changes how caches are reordered) and the
    global random state. The stream is seeded from that state, so a resumed run draws what the killed one would have
    drawn, and from the worker's rank, because fairseq seeds all workers alike.
    """
    modes = [(module, module.training) for module in model.modules()]
    beam_size = getattr(model.decoder, "_beam_size", 1)
    on_gpu = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=on_gpu), torch.no_grad():
        seed = int(torch.randint(2**62, (1,), device=device)) + _rank()
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            torch.cuda.manual_seed(seed)
        model.eval()
        _set_beam_size(model.decoder, 1)
        try:
            yield
        finally:
            _set_beam_size(model.decoder, beam_size)
            for module, mode in modes:
                module.training = mode


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _set_beam_size(decoder: nn.Module, beam_size: int) -> None:
    if hasattr(decoder, "set_beam_size"):
        decoder.set_beam_size(beam_size)
