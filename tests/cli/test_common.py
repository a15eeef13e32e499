"""What the commands have in common."""
import sys

import pytest

from fairseq_earm.cli.common import drawing
from fairseq_earm.errors import UsageError


def test_without_matplotlib_one_line_says_who_needs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "fairseq_earm.evaluation.curves", None)
    with pytest.raises(UsageError, match="--plot draws with matplotlib, which is not installed: leave the flag out$"):
        drawing("curves", "--plot draws", "leave the flag out")


def test_a_module_that_draws():
    pytest.importorskip("matplotlib")
    assert callable(drawing("curves", "it draws").convergence)
