"""Reading a whole prefix into a decoder's key-value cache, in one pass where the decoder allows it."""
from __future__ import annotations

from fairseq.models.transformer import TransformerDecoder
from fairseq.modules import MultiheadAttention
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase
from torch import Tensor


def prefill(decoder, prefixes: Tensor, cache: dict) -> None:
    """Fill `cache` as if the decoder had read `prefixes` token by token; call it without gradients.

    fairseq's decoders take one token a call once there is a cache. A transformer's cache is no more than the keys and
    values of its self-attentions, and these come from one pass over all tokens; a decoder that has `reads_prefixes` takes
    all new tokens of a call; others do read token by token.

    Args:
        decoder: an incremental decoder without an encoder.
        prefixes: (B, P) decoder input without padding.
        cache: the incremental state, empty.
    """
    if prefixes.size(1) == 0:
        return
    if _is_plain_transformer(decoder):
        _prefill_in_one_pass(decoder, prefixes, cache)
        return
    if getattr(decoder, "reads_prefixes", False):
        decoder(prefixes, incremental_state=cache, features_only=True)
        return
    for end in range(1, prefixes.size(1) + 1):
        decoder(prefixes[:, :end], incremental_state=cache)


def _is_plain_transformer(decoder) -> bool:
    # A subclass may keep more than keys and values; and only this attention is known to keep no more.
    return type(decoder) is TransformerDecoder and all(
        type(layer) is TransformerDecoderLayerBase
        and type(layer.self_attn) is MultiheadAttention
        and layer.self_attn.bias_k is None
        and not layer.self_attn.add_zero_attn
        for layer in decoder.layers
    )


def _prefill_in_one_pass(decoder, prefixes: Tensor, cache: dict) -> None:
    def keep_keys_and_values(layer, inputs):
        x = layer.self_attn_layer_norm(inputs[0]) if layer.normalize_before else inputs[0]  # (P, B, C)
        attention = layer.self_attn
        keys, values = (_by_head(project(x), attention) for project in (attention.k_proj, attention.v_proj))
        attention._set_input_buffer(cache, {"prev_key": keys, "prev_value": values, "prev_key_padding_mask": None})

    hooks = [layer.register_forward_pre_hook(keep_keys_and_values) for layer in decoder.layers]
    try:
        decoder(prefixes, features_only=True)
    finally:
        for hook in hooks:
            hook.remove()


def _by_head(x: Tensor, attention) -> Tensor:
    """(P, B, C) → (B, heads, P, C / heads), as the attention keeps it."""
    steps, batch, _ = x.shape
    return x.reshape(steps, batch, attention.num_heads, attention.head_dim).permute(1, 2, 0, 3).contiguous()
