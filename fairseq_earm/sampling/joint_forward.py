"""One forward of the (possibly distributed) model, two decoder passes."""
from __future__ import annotations

from typing import Callable, Optional

from fairseq.models import BaseFairseqModel


def forward_with_negatives(model, net_input: dict, decode_negatives: Callable) -> tuple:
    """Run the model on the data and its decoder once more on negatives, in the same mode.

    Distributed wrappers want their own forward to run exactly once per update, and sharded ones gather parameters only
    inside it. So the negatives' pass rides along: it is started by hooks within that one forward, and handed out with
    the data's, because wrappers learn from what they hand out which parameters and gradients to expect.

    Args:
        model: the model as the criterion got it, wrapped or not.
        net_input: the batch's `net_input`.
        decode_negatives: from the data's encoder output (None of a model without encoder) to the decoder's on negatives.
    Returns:
        (data's net output, negatives' net output).
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

    def hand_out_both(module, inputs, output):
        return output, negative_output

    decoder_hook = model.decoder.register_forward_hook(run_negatives)
    hooks = [decoder_hook, unwrapped(model).register_forward_hook(hand_out_both)]
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
