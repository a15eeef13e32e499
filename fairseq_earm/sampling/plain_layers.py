"""Whether a part of a transformer is fairseq's own, as it came: only then may its sums be done in another way."""
from __future__ import annotations

from fairseq.modules import MultiheadAttention
from torch import nn

RARE_OPTIONS = ("c_attn", "attn_ln", "ffn_layernorm", "w_resid")


def is_plain_stack(stack, layer_kind: type) -> bool:
    """Whether an encoder or decoder in eval mode holds nothing but plain layers, and nobody looks into it."""
    return (
        not stack.training
        and stack.quant_noise is None
        and all(_is_plain_layer(layer, layer_kind) for layer in layers_of(stack))
        and all(map(_is_untouched, stack.modules()))
    )


def layers_of(stack) -> list:
    """All layers in their order. To iterate over those of a model with LayerDrop takes random numbers, also in eval mode."""
    return list(stack.layers.children())


def _is_plain_layer(layer, kind: type) -> bool:
    if type(layer) is not kind:
        return False
    attentions = [layer.self_attn, getattr(layer, "encoder_attn", None)]
    return (
        all(attention is None or _is_plain_attention(attention) for attention in attentions)
        and type(layer.fc1) is type(layer.fc2) is nn.Linear
        and all(getattr(layer, name, None) is None for name in RARE_OPTIONS)
    )


def _is_plain_attention(attention) -> bool:
    return (
        type(attention) is MultiheadAttention
        and attention.bias_k is None
        and not attention.add_zero_attn
        and not getattr(attention, "use_xformers", False)
        and not getattr(attention, "skip_embed_dim_check", False)  # heads were pruned
        and all(type(getattr(attention, name)) is nn.Linear for name in ("q_proj", "k_proj", "v_proj", "out_proj"))
    )


def _is_untouched(module: nn.Module) -> bool:
    """No hooks, no method of its own in the place of its class's, no dropout that stays on."""
    own = [value for name, value in vars(module).items() if callable(getattr(type(module), name, None))]
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or not all(getattr(method, "plain_in_eval_mode", False) for method in own)
        or getattr(module, "apply_during_inference", False)
    )
