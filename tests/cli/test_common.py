"""What the commands have in common."""
import signal
import subprocess
import sys

import pytest

from fairseq_earm.cli import analyse, evaluate, exposure_bias, next_token, perplexity, report, sample, tune
from fairseq_earm.cli.common import drawing
from fairseq_earm.errors import UsageError


def test_without_matplotlib_one_line_says_who_needs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "fairseq_earm.evaluation.curves", None)
    with pytest.raises(UsageError, match="--plot draws with matplotlib, which is not installed: leave the flag out$"):
        drawing("curves", "--plot draws", "leave the flag out")


def test_a_module_that_draws():
    pytest.importorskip("matplotlib")
    assert callable(drawing("curves", "it draws").convergence)


def last_word(capsys):
    """What Python says of an interrupt that nobody caught."""
    sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    return capsys.readouterr().err


WITH_JSON = ", and with --json it goes on where it stopped"


@pytest.mark.parametrize("command, more", [
    (analyse, ""), (evaluate, ""), (next_token, ""), (report, ""), (tune, ""), (perplexity, WITH_JSON),
    (exposure_bias, WITH_JSON), (sample, ", and samples of text go on where they stopped"),
])
def test_every_command_says_in_one_line_how_to_go_on_after_ctrl_c(monkeypatch, capsys, command, more):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setattr(command, "_parser", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command.main(["--output", "samples"])
    assert last_word(capsys) == f"fairseq-earm: interrupted: start the same command again{more}\n"
    sys.excepthook(ValueError, ValueError("another error"), None)
    assert capsys.readouterr().err == "ValueError: another error\n"


def test_an_interrupted_command_ends_by_the_signal():
    """So that a shell's loop over commands ends too."""
    code = "from fairseq_earm.cli.common import interruptible\nwith interruptible():\n raise KeyboardInterrupt"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGINT
    assert done.stderr.splitlines()[-1] == "fairseq-earm: interrupted: start the same command again"
    assert "Traceback" not in done.stderr
