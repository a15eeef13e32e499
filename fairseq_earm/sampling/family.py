"""What E-ARM must know of a kind of model: how its negatives are drawn, and how they are scored beside the data."""
from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple, Optional

from torch import Tensor

from fairseq_earm.errors import UsageError
from fairseq_earm.sampling.decoding import check_bf16
from fairseq_earm.sampling.heads import Head, LogitHead, ProjectedHead, check_projection
from fairseq_earm.sampling.joint_forward import check_without_dropout, without_dropout
from fairseq_earm.sampling.samples import Samples
from fairseq_earm.sampling.scheduled import teacher_forced
from fairseq_earm.sampling.scoring import full_logits


class Passes(NamedTuple):
    """What one forward of the model says about the data and the negatives.

    Attributes:
        data: the data's (B, T) steps, as cross-entropy sees them; (B, T + 1) where energies are read one step later.
        teacher_forced: the steps of the data's energies: the same ones, except under scheduled sampling, which feeds
            cross-entropy's decoder with other words than the data's.
        negatives: the steps of the negatives' tokens, (R, T'); None for the controls that have none.
        without_dropout: the steps of the data's energies by one more pass, without dropout, as the negatives' then is
            too; None where there was none.
    """

    data: Head
    teacher_forced: Head
    negatives: Optional[Head] = None
    without_dropout: Optional[Head] = None


class ModelFamily:
    """One kind of model. `earm_cross_entropy` asks the task for it: `task.build_model_family(cfg)`, `cfg` its own flags.

    Attributes:
        without_effect: those of the criterion's flags, by their names in `cfg`, that mean nothing for this kind of model.
        loss_rows: steps whose logits are held at once; 0 for all of them.
        bf16: whether negatives are drawn by products in bfloat16.
        dropout: the criterion's --earm-dropout.
    """

    without_effect: tuple = ()
    loss_rows: int = 0
    bf16: bool = False
    dropout: str = "shared"

    def check(self, model) -> None:
        """Refuse, with a UsageError, a model that E-ARM cannot be computed for."""
        if self.loss_rows:
            check_projection(model)
        if self.bf16:
            check_bf16(model)
        if self.dropout != "shared":
            check_without_dropout(model, f"--earm-dropout {self.dropout}")

    def draw(self, model, sample: dict, negatives: int) -> Samples:
        """Draw `negatives` sequences from the model for each row of a batch, leaving no trace in the model."""
        raise NotImplementedError

    def forward(self, model, sample: dict, samples: Optional[Samples] = None, *, energies: bool = True) -> Passes:
        """The data, and the negatives if there are any, in one forward of the model, wrapped or not.

        Args:
            energies: whether the data's energies are wanted, for which `dropout` may ask for one more pass.
        """
        raise NotImplementedError

    def contrasted(self, values: Tensor) -> Tensor:
        """Of (B, T) values at the data's steps those (B, T') that the negatives' steps are held against, in their order."""
        return values

    def decoder_flags(self) -> dict:
        """What the model and its decoder are called with, so that they return what `head` reads."""
        return {"features_only": True} if self.loss_rows else {}

    def head(self, decoder, net_output: tuple) -> Head:
        """The head of what a decoder returned."""
        if self.loss_rows:
            return ProjectedHead(net_output[0], decoder.output_projection, self.loss_rows)
        return LogitHead(full_logits(decoder, net_output))

    def passes(self, decoder, outputs: tuple) -> Passes:
        """The heads of what `forward_with_negatives` returned."""
        data, negatives, again = outputs
        head, first = self.head(decoder, data), teacher_forced(data)
        # An adaptive softmax has dropout of its own.
        with nullcontext() if again is None else without_dropout(decoder):
            others = (None if output is None else self.head(decoder, output) for output in (negatives, again))
            return Passes(head, head if first is None else LogitHead(first), *others)


def end_of_sentence(dictionary) -> int:
    """Index of end-of-sentence.

    Raises:
        UsageError: the dictionary has none.
    """
    eos = getattr(dictionary, "eos_index", None)
    if eos is None or not 0 <= eos < len(dictionary) or eos == dictionary.pad():
        raise UsageError(
            "--criterion earm_cross_entropy: the target dictionary has no end-of-sentence, without which no sample would "
            "end; use one built by fairseq-preprocess"
        )
    return eos
