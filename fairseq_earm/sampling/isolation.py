"""Using a model in the middle of something else, without leaving a trace in it."""
from __future__ import annotations

from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn


@contextmanager
def on_its_own(model: nn.Module):
    """Eval mode, every row of a batch attending to its own source; all restored afterwards.

    fairseq's `SequenceGenerator` calls `model.eval()`, tells the attention that each `beam_size` rows share one source
    (which also changes how caches are reordered), and for BART puts a function that does nothing over the encoder's
    `reorder_encoder_out`. None of it fits a batch of ours, and nothing of ours may stay behind.
    """
    modes = [(module, module.training) for module in model.modules()]
    names = ("beam_size", "_beam_size")  # of an attention, of a decoder
    beams = [(module, name, vars(module)[name]) for module in model.modules() for name in names if name in vars(module)]
    encoder = getattr(model, "encoder", None)
    reorder = None if encoder is None else vars(encoder).pop("reorder_encoder_out", None)
    model.eval()
    for module, name, _ in beams:
        setattr(module, name, 1)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for module, name, beam_size in beams:
            setattr(module, name, beam_size)
        if reorder is not None:
            encoder.reorder_encoder_out = reorder


@contextmanager
def gathered(model: nn.Module):
    """All parameters of a sharded model at hand, and no wrapper around its parts; nothing to do for other models.

    Under `--ddp-backend fully_sharded` each worker holds a share of the parameters, and a wrapped part collects its own
    for each call. Workers draw sequences of different lengths, hence call a decoder differently often, and would wait
    for each other for ever. So everything is collected once, in the precision the parameters are kept in, and wrapped
    parts are called directly. It takes all workers: each must come here as often as the others.
    """
    if not hasattr(model, "summon_full_params"):
        yield
        return
    with model.summon_full_params(volatile=True):
        children = [(owner, name, child) for owner in model.modules() for name, child in owner._modules.items()]
        wrapped = [found for found in children if hasattr(type(found[2]), "summon_full_params")]
        for owner, name, child in wrapped:
            owner._modules[name] = child.module.module
        try:
            yield
        finally:
            for owner, name, child in wrapped:
                owner._modules[name] = child


@contextmanager
def own_randomness(tokens: torch.Tensor, salt: int = 0):
    """Draw, in a training step, from a stream of random numbers that is nobody else's.

    The global random state is as before afterwards. The stream is seeded from that state, so a resumed run draws what
    the killed one would have drawn; from the worker's rank, because fairseq seeds all workers alike; from the tokens,
    because nothing else tells the batches of one update apart where there is no dropout; and from the salt, which
    tells apart who draws for the same tokens.
    """
    device = tokens.device
    on_gpu = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=on_gpu):
        places = torch.arange(1, tokens.numel() + 1, device=device)
        seed = int(torch.randint(2**61, (1,), device=device) + (places * tokens.flatten()).sum()) + _rank() + salt
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            torch.cuda.manual_seed(seed)
        yield


@contextmanager
def isolated(model: nn.Module, src_tokens: torch.Tensor):
    """Run sampling code in a training step: `on_its_own`, without gradients, on `own_randomness`."""
    try:
        with gathered(model), torch.no_grad(), on_its_own(model), own_randomness(src_tokens):
            yield
    finally:
        torch.clear_autocast_cache()  # older torch would train on the casts made here, which have no gradient


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
