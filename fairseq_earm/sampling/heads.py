"""What a decoder's pass says at its steps, before it is asked about tokens: a softmax head that the loss reads once."""
from __future__ import annotations

import inspect
from typing import NamedTuple, Union

import torch
from torch import Tensor, nn

from fairseq_earm.ebm.loss_head import TokenStatistics, projected_statistics, token_statistics
from fairseq_earm.errors import UsageError
from fairseq_earm.sampling.joint_forward import unwrapped


class LogitHead(NamedTuple):
    """A head whose logits (B, T, V) are there already."""

    logits: Tensor

    @property
    def vocabulary(self) -> int:
        return self.logits.size(-1)

    def statistics(self, tokens: Tensor, *, mean: bool = True) -> TokenStatistics:
        """Statistics of (B, T) tokens, the mean logit if wanted."""
        return token_statistics(self.logits, tokens, mean=mean)

    def likeliest(self) -> Tensor:
        """(B, T) the likeliest tokens."""
        return self.logits.argmax(-1)

    def after(self, steps: int) -> LogitHead:
        """The head without its first `steps` steps."""
        return LogitHead(self.logits[:, steps:])


class ProjectedHead(NamedTuple):
    """A head whose logits are computed `rows` steps at a time, and never held together.

    Attributes:
        hidden: (B, T, D) states.
        projection: from states to logits, its weight (V, D) tied to an embedding or not.
        rows: steps whose logits are held at once.
    """

    hidden: Tensor
    projection: nn.Linear
    rows: int

    @property
    def vocabulary(self) -> int:
        return self.projection.weight.size(0)

    def statistics(self, tokens: Tensor, *, mean: bool = True) -> TokenStatistics:
        """Statistics of (B, T) tokens, the mean logit if wanted."""
        return projected_statistics(self.hidden, self.projection.weight, tokens, self.projection.bias, rows=self.rows, mean=mean)

    @torch.no_grad()
    def likeliest(self) -> Tensor:
        """(B, T) the likeliest tokens."""
        found = [self.projection(states).argmax(-1) for states in self.hidden.flatten(0, 1).split(self.rows)]
        return torch.cat(found).view(self.hidden.shape[:2])

    def after(self, steps: int) -> ProjectedHead:
        """The head without its first `steps` steps."""
        return self._replace(hidden=self.hidden[:, steps:])


Head = Union[LogitHead, ProjectedHead]


def check_projection(model) -> None:
    """Refuse models whose states and projection cannot be had apart.

    Raises:
        UsageError: one line that names the cause and the remedy.
    """
    decoder = model.decoder
    apart = isinstance(getattr(decoder, "output_projection", None), nn.Linear)
    apart = apart and getattr(decoder, "adaptive_softmax", None) is None
    # A model with an encoder that does not know the flag gives it to the encoder too, or takes it for a mistake.
    asked = [decoder, unwrapped(model)] if hasattr(model, "encoder") else [decoder]
    if not apart or not all("features_only" in inspect.signature(module.forward).parameters for module in asked):
        raise UsageError(
            f"--earm-loss-rows: {type(model).__name__} does not hand out its states without its logits (transformer, "
            "transformer_lm and transformer_xl_lm without an adaptive softmax do); leave the flag out"
        )
    # The projection is used outside of the wrapper's forward: a sharded one is gone by then, and DDP, asked to look for
    # unused parameters, takes it for one, unless the decoder has read it as its embedding.
    tied = getattr(getattr(decoder, "embed_tokens", None), "weight", None) is decoder.output_projection.weight
    for module in model.modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise UsageError("--earm-loss-rows: does not go with --ddp-backend fully_sharded; leave the flag out, or use another backend")
        if getattr(module, "find_unused_parameters", False) and not tied:
            raise UsageError("--earm-loss-rows: --find-unused-parameters goes with a decoder's tied embedding only; leave one of the two out")
