"""RALM of Deng et al. 2020 (Eq. 6): a language model trained on what a frozen one leaves, normalised token by token.

log P(x_t | x_<t) = log P_base(x_t | x_<t) + logit(x_t | x_<t) − log Σ over the vocabulary.
"""
from dataclasses import dataclass, field
from typing import Optional

import torch
from fairseq.models import FairseqIncrementalDecoder, register_model
from fairseq.models.transformer_lm import TransformerLanguageModel, TransformerLanguageModelConfig

from fairseq_earm.ebm.energy import widen
from fairseq_earm.errors import UsageError
from fairseq_earm.sampling.frozen import FrozenModel, load_frozen


class ResidualDecoder(FairseqIncrementalDecoder):
    """Adds a frozen language model's log-probabilities to a decoder's logits.

    The frozen one is no part of the module: it is in no checkpoint and has no gradient. It follows the module from
    device to device and into half precision.

    Args:
        residual: the decoder that learns.
        base: a language model with the same dictionary.
    """

    def __init__(self, residual: FairseqIncrementalDecoder, base: FrozenModel):
        super().__init__(residual.dictionary)
        self.residual = residual
        self.base = base

    def forward(self, prev_output_tokens, encoder_out=None, incremental_state=None, **kwargs):
        """Tokens (B, T) → logits (B, T, V), or those of the last step alone (B, 1, V), in float32 or wider."""
        logits, extra = self.residual(prev_output_tokens, incremental_state=incremental_state, **kwargs)
        base = self.base.model
        with torch.no_grad():
            # Each decoder keeps its state under names of its own, so that one dictionary serves both.
            output = base.decoder(prev_output_tokens, incremental_state=incremental_state)
            log_base = base.get_normalized_probs(output, log_probs=True)
        return widen(logits) + widen(log_base), extra

    def reorder_incremental_state(self, incremental_state, new_order):
        """fairseq reorders the state of submodules; the frozen model is none."""
        self.base.model.decoder.reorder_incremental_state_scripting(incremental_state, new_order)

    def max_positions(self):
        return min(self.residual.max_positions(), self.base.model.max_positions())

    def _apply(self, fn, *args, **kwargs):
        self.base.model._apply(fn, *args, **kwargs)
        return super()._apply(fn, *args, **kwargs)


@dataclass
class ResidualTransformerLanguageModelConfig(TransformerLanguageModelConfig):
    """Everything of `transformer_lm`, for the residual part."""

    base_lm: Optional[str] = field(
        default=None,
        metadata={
            "help": "checkpoint of the frozen language model; the trained model is loaded together with it (if it moved: "
            "--model-overrides \"{'base_lm': PATH}\")"
        },
    )


@register_model("residual_transformer_lm", dataclass=ResidualTransformerLanguageModelConfig)
class ResidualTransformerLanguageModel(TransformerLanguageModel):
    """RALM: trained by `cross_entropy`, evaluated and sampled like any language model."""

    @classmethod
    def build_model(cls, args, task):
        """Build the residual part and load its base.

        Raises:
            UsageError: no usable base, another dictionary, or an adaptive softmax.
        """
        if args.base_lm is None:
            raise UsageError("residual_transformer_lm needs --base-lm: the checkpoint of a language model")
        if args.adaptive_softmax_cutoff is not None:
            raise UsageError("--adaptive-softmax-cutoff: residual_transformer_lm needs every word's logit; leave it out")
        base = load_frozen(args.base_lm, task, flag="--base-lm")
        if not isinstance(getattr(base.model, "decoder", None), FairseqIncrementalDecoder) or hasattr(base.model, "encoder"):
            kind = type(base.model).__name__
            raise UsageError(f"--base-lm {args.base_lm}: a {kind}, which is no language model; give one")
        model = super().build_model(args, task)
        model.decoder = ResidualDecoder(model.decoder, base)
        return model
