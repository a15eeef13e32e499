"""A mistake is one line, whatever stands in the files that it speaks of."""
import logging
from argparse import Namespace

import pytest

from fairseq_earm.cli import next_token
from fairseq_earm.errors import UsageError, one_line, reason
from fairseq_earm.models import energy_init, load_energy

FORGED = "x\r\nfairseq-earm: error: forged\x1b[2J\x9b1A\x07\u2028y"
SHOWN = r"x\r\nfairseq-earm: error: forged\x1b[2J\x9b1A\x07\u2028y"


def test_control_characters_are_shown_and_not_obeyed():
    assert one_line(FORGED) == SHOWN
    assert str(UsageError(f"--path {FORGED}: no")) == f"fairseq-earm: error: --path {SHOWN}: no"


def test_all_other_text_stays():
    assert one_line("ä 数据 \U0001f600 \u202e C:\\new") == "ä 数据 \U0001f600 \u202e C:\\new"


def test_a_reason_is_the_first_line():
    assert reason(ValueError("\n a\x1b[2J\rb\nc")) == r"a\x1b[2J\rb"
    assert reason(UsageError("a")) == "a" and reason(KeyError()) == "KeyError"
    assert len(reason(ValueError("\0" * 999))) == 300


def test_the_name_of_a_checkpoint_s_model_forges_no_line():
    state = {"cfg": Namespace(model=Namespace(_name=FORGED)), "model": {}}
    with pytest.raises(UsageError) as error:
        energy_init._trunk_parameters("lm.pt", state, energy_init.LANGUAGE_MODEL)
    assert str(error.value).startswith(f"fairseq-earm: error: --energy-init lm.pt: a {SHOWN}, and this network starts")


def test_the_base_that_a_checkpoint_names_forges_no_line(tmp_path, caplog):
    for name in (FORGED, "base.pt"):
        (tmp_path / name).write_text(name)
    energy = Namespace(task=Namespace(cfg=Namespace(base_lm=str(tmp_path / FORGED))))
    with caplog.at_level(logging.WARNING):
        load_energy.report_other_base(energy, "energy.pt", str(tmp_path / "base.pt"))
    assert caplog.messages[0].endswith(f"was trained on, {tmp_path}/{SHOWN}")


def test_the_words_of_a_dictionary_forge_no_row():
    row = {"token": FORGED, "base": 0.5, "base_of_k": 0.5, "joint_of_k": 0.5, "standard_error": 0.0}
    printed = next_token._table({"prefix": FORGED, "rest": 0, "samples": 0, "base_share_of_k": 1.0, "tokens": [row]})
    assert printed.count(SHOWN) == 2 and printed.count("\n") == 4
    assert not set(printed) & set(FORGED) - set(SHOWN) - {"\n"}
