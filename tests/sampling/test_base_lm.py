"""Which models can be the base of a residual energy over text."""
from argparse import Namespace

import pytest
import torch
from fairseq.models import FairseqDecoder, FairseqLanguageModel

from fairseq_earm.errors import UsageError
from fairseq_earm.sampling import base_lm
from fairseq_earm.sampling.frozen import FrozenModel
from tests.sampling.test_frozen import task_of
from tests.tiny_language import TIED, tiny_language_model
from tests.tiny_model import tiny_model


def test_a_language_model_is_loaded(text):
    frozen = base_lm.load_base_lm(
        str(text.base), task_of(text.data), flag="--base-lm", sequence_length=12, dtype=torch.float16
    )
    assert not frozen.model.training and next(frozen.model.parameters()).dtype == torch.float16


def test_one_with_an_adaptive_softmax_is_taken(monkeypatch):
    frozen = FrozenModel(tiny_language_model(words=3, **TIED), Namespace(targets=["future"]))
    monkeypatch.setattr(base_lm, "load_frozen", lambda *args, **kwargs: frozen)
    assert base_lm.load_base_lm("x.pt", None, flag="--base-lm", sequence_length=4) is frozen


def test_longer_than_its_positions_is_refused(text):
    with pytest.raises(UsageError, match="--sequence-length 13: --base-lm .* has 12 positions.*--tokens-per-sample 13"):
        base_lm.load_base_lm(str(text.base), task_of(text.data), flag="--base-lm", sequence_length=13)


class Unordered(FairseqDecoder):
    """A decoder that cannot go on token by token."""


@pytest.mark.parametrize(
    "model, targets, message",
    [
        (tiny_model, ["future"], "is a TransformerModel: give a language model"),
        (lambda: FairseqLanguageModel(Unordered(None)), ["future"], "does not write from left to right"),
        (tiny_language_model, ["past", "future"], "does not write from left to right"),
    ],
)
def test_other_kinds_are_refused(monkeypatch, model, targets, message):
    frozen = FrozenModel(model(), Namespace(targets=targets))
    monkeypatch.setattr(base_lm, "load_frozen", lambda *args, **kwargs: frozen)
    with pytest.raises(UsageError, match=message) as error:
        base_lm.load_base_lm("x.pt", None, flag="--base-lm", sequence_length=4)
    assert "--base-lm x.pt" in str(error.value) and "\n" not in str(error.value)


def test_a_base_that_was_trained_to_begin_otherwise_is_warned_about(monkeypatch, caplog):
    for flag, warnings in ((False, 0), (True, 1)):
        frozen = FrozenModel(tiny_language_model(), Namespace(targets=["future"], args=Namespace(add_bos_token=flag)))
        monkeypatch.setattr(base_lm, "load_frozen", lambda *args, **kwargs: frozen)
        base_lm.load_base_lm("x.pt", None, flag="--base-lm", sequence_length=4)
        assert caplog.text.count("--base-lm x.pt was trained with --add-bos-token") == warnings
