"""What E-ARM must know of a kind of model: how its negatives are drawn, and how they are scored beside the data."""
from __future__ import annotations

from typing import NamedTuple, Optional

from torch import Tensor

from fairseq_earm.errors import UsageError
from fairseq_earm.sampling.samples import Samples
from fairseq_earm.sampling.scheduled import teacher_forced
from fairseq_earm.sampling.scoring import full_logits


class Passes(NamedTuple):
    """What one forward of the model says about the data and the negatives.

    Attributes:
        logits: (B, T, V) of the data, as cross-entropy sees them; (B, T + 1, V) where energies are read one step later.
        teacher_forced: logits of the data's energies: the same ones, except under scheduled sampling, which feeds
            cross-entropy's decoder with other words than the data's.
        negatives: (R, T', V) at the steps of the negatives' tokens; None for the control, which has none.
    """

    logits: Tensor
    teacher_forced: Tensor
    negatives: Optional[Tensor] = None


class ModelFamily:
    """One kind of model. `earm_cross_entropy` asks the task for it: `task.build_model_family(cfg)`, `cfg` its own flags.

    Attributes:
        without_effect: those of the criterion's flags, by their names in `cfg`, that mean nothing for this kind of model.
    """

    without_effect: tuple = ()

    def check(self, model) -> None:
        """Refuse, with a UsageError, a model that E-ARM cannot be computed for."""

    def draw(self, model, sample: dict, negatives: int) -> Samples:
        """Draw `negatives` sequences from the model for each row of a batch, leaving no trace in the model."""
        raise NotImplementedError

    def forward(self, model, sample: dict) -> Passes:
        """The data alone, for the control."""
        raise NotImplementedError

    def forward_pair(self, model, sample: dict, samples: Samples) -> Passes:
        """The data and the negatives in one forward of the model, wrapped for distributed training or not."""
        raise NotImplementedError

    def contrasted(self, values: Tensor) -> Tensor:
        """Of (B, T) values at the data's steps those (B, T') that the negatives' steps are held against, in their order."""
        return values


def data_passes(decoder, net_output: tuple) -> Passes:
    """The data's logits in what a model returned, both kinds of them."""
    logits = full_logits(decoder, net_output)
    return Passes(logits, teacher_forced(net_output, logits))


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
