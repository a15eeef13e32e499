"""The benchmarks run, and what they compare is the same loss."""
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "benchmarks"))

import loss_head  # noqa: E402
import timing  # noqa: E402


def test_every_loss_head_has_the_same_loss():
    torch.manual_seed(1)
    hidden, weight, target = torch.randn(6, 4), torch.randn(9, 4), torch.randint(9, (6,))
    logits = hidden @ weight.T
    expected = loss_head.fairseqs(logits, target)
    found = [
        loss_head.ours(loss_head.token_statistics(logits, target), 9),
        loss_head.ours(loss_head.projected_statistics(hidden, weight, target, rows=4), 9),
    ]
    torch.testing.assert_close(found, [expected, expected])


def test_its_table(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["loss_head.py", "--tokens", "20", "--vocabulary", "30", "--dim", "4", "--rows", "8", "--rounds", "1"])
    threads = torch.get_num_threads()
    try:
        loss_head.main()
    finally:
        torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("20 tokens, states of 4; ")
    rows = [line.split(" | ") for line in lines[4:]]
    assert [row[1] for row in rows] == [
        "fairseq, from logits", "one gradient buffer", "fairseq, from states", "one gradient buffer", "8 rows at once",
    ]
    assert [row[3] for row in rows if row[1].startswith("fairseq")] == ["1.00", "1.00"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures the process's memory")
def test_memory_is_what_a_call_holds_at_most():
    def hold_and_free():
        for _ in range(3):
            torch.ones(2**20)  # 4 MB, freed before the next

    assert timing.peak_memory(hold_and_free) == pytest.approx(4, abs=2)
