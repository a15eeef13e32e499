"""One forward of the (possibly distributed) model, and further passes within it."""
from __future__ import annotations

from contextlib import contextmanager
from typing import Callable, Optional

from fairseq.models import BaseFairseqModel
from torch import nn

from fairseq_earm.errors import UsageError


def forward_with_negatives(
    model, net_input: dict, decode_negatives: Optional[Callable] = None, *, data_again: Optional[Callable] = None
) -> tuple:
    """Run the model on the data and its decoder once more on negatives.

    Distributed wrappers want their own forward to run exactly once per update, and sharded ones gather parameters only
    inside it. So the further passes ride along: hooks start them within that one forward, and hand their outputs out
    with the data's, because wrappers learn from what they hand out which parameters and gradients to expect.

    Args:
        model: the model as the criterion got it, wrapped or not.
        net_input: the batch's `net_input`.
        decode_negatives: from the data's encoder output (None of a model without encoder) to the decoder's on negatives.
        data_again: from the model without its wrappers to its net output on the data. It is called without dropout, and
            so are the negatives, then from the encoder output of that pass.
    Returns:
        (data's net output, negatives' net output or None, net output of `data_again` or None).
    """
    encoder_out: Optional[object] = None
    negative_output: Optional[tuple] = None

    def keep_encoder_out(module, inputs, output):
        nonlocal encoder_out
        encoder_out = output

    def run_negatives(module, inputs, output):
        nonlocal negative_output
        decoder_hook.remove()
        negative_output = decode_negatives(encoder_out)

    def hand_out_all(module, inputs, output):
        if data_again is None:
            return output, negative_output, None
        with without_dropout(module):
            again = data_again(module)
            return output, None if decode_negatives is None else decode_negatives(encoder_out), again

    inner = unwrapped(model)
    hooks = [inner.register_forward_hook(hand_out_all)]
    if decode_negatives is not None and data_again is None:
        decoder_hook = model.decoder.register_forward_hook(run_negatives)
        hooks.append(decoder_hook)
    if hasattr(model, "encoder"):
        hooks.append(model.encoder.register_forward_hook(keep_encoder_out))
    try:
        return model(**net_input)
    finally:
        for hook in hooks:
            hook.remove()


def unwrapped(model) -> BaseFairseqModel:
    """The model inside of whatever wrappers distributed training put around it."""
    return next(module for module in model.modules() if isinstance(module, BaseFairseqModel))


@contextmanager
def without_dropout(model: nn.Module):
    """Eval mode, with gradients; recurrent layers stay in training mode, without which cuDNN gives them no gradient."""
    modes = [(module, module.training) for module in model.modules()]
    recurrent = [(module, module.dropout) for module in model.modules() if isinstance(module, nn.RNNBase)]
    model.eval()
    for module, _ in recurrent:
        module.training, module.dropout = True, 0.0
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for module, dropout in recurrent:
            module.dropout = dropout


def check_without_dropout(model: nn.Module, flag: str) -> None:
    """Refuse models whose backward pass computes layers once more, by then with dropout.

    Raises:
        UsageError: one line that begins with the flag and its value.
    """
    if any(hasattr(module, "precheckpoint_forward") for module in model.modules()):  # left by fairseq's wrapper
        raise UsageError(
            f"{flag}: --checkpoint-activations computes layers again with dropout; leave one of the two out"
        )
