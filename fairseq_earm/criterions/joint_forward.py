"""One forward of the (possibly distributed) model, two decoder passes on one encoder output."""
from __future__ import annotations

from typing import Optional

from fairseq.models import BaseFairseqModel
from torch import Tensor


def forward_with_negatives(model, net_input: dict, negative_input: Tensor, sources: Tensor) -> tuple:
    """Run the model on the data and its decoder once more on negatives, with the same encoder output and mode.

    Distributed wrappers want their own forward to run exactly once per update, and sharded ones gather parameters only
    inside it. So the negatives' pass rides along: it is started by hooks within that one forward, and handed out with
    the data's, because wrappers learn from what they hand out which parameters and gradients to expect.

    Args:
        model: the encoder-decoder model as the criterion got it, wrapped or not.
        net_input: the batch's `net_input`.
        negative_input: (R, T) decoder input of the negatives.
        sources: (R,) row of the batch that each negative belongs to.
    Returns:
        (data's net output, negatives' net output).
    """
    encoder, decoder = model.encoder, model.decoder
    encoder_out: Optional[object] = None
    negative_output: Optional[tuple] = None

    def keep_encoder_out(module, inputs, output):
        nonlocal encoder_out
        encoder_out = output

    def decode_negatives(module, inputs, output):
        nonlocal negative_output
        decoder_hook.remove()
        negative_output = decoder(negative_input, encoder_out=encoder.reorder_encoder_out(encoder_out, sources))

    def hand_out_both(module, inputs, output):
        return output, negative_output

    inner = next(module for module in model.modules() if isinstance(module, BaseFairseqModel))
    encoder_hook = encoder.register_forward_hook(keep_encoder_out)
    decoder_hook = decoder.register_forward_hook(decode_negatives)
    inner_hook = inner.register_forward_hook(hand_out_both)
    try:
        return model(**net_input)
    finally:
        encoder_hook.remove()
        decoder_hook.remove()
        inner_hook.remove()
