"""The residual demonstration: its language against brute force, its exact figures against hand-made models, all of it in small."""
import math
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from fairseq.data import Dictionary

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "residual_ebm" / "synthetic"
sys.path.insert(0, str(FOLDER))

import anagrams  # noqa: E402
import residual_demo  # noqa: E402
import residual_measure  # noqa: E402
import residual_report  # noqa: E402
import residual_settings as settings  # noqa: E402

FIRST = tuple("aabca")


def test_probabilities_of_all_second_halves_sum_to_one():
    assert sum(math.exp(anagrams.log_probability(FIRST, half)) for half in anagrams.second_halves()) == pytest.approx(1.0)


def test_lines_are_drawn_with_these_probabilities():
    lines = anagrams.sample_lines(4000, seed=5)
    said = Counter(anagrams.says_again(line[: anagrams.HALF], line[anagrams.HALF:]) for line in lines)[True] / 4000
    expected = sum(
        math.exp(anagrams.log_probability(FIRST, half)) for half in anagrams.second_halves() if anagrams.says_again(FIRST, half)
    )
    # All first halves are alike in this but for repetitions, which help a little.
    assert abs(said - expected) < 0.06
    assert anagrams.sample_lines(3, seed=5) == lines[:3]


def dictionary():
    words = Dictionary()
    for word in anagrams.WORDS:
        words.add_symbol(word)
    return words


class BaseByTable(torch.nn.Module):
    """A language model that says every word of the language alike, and the end of the line when it is due."""

    def __init__(self, words):
        super().__init__()
        self.words, self.decoder = words, self

    def forward(self, tokens, incremental_state=None):
        logits = torch.full((*tokens.shape, len(self.words)), -1e9)
        logits[..., self.words.nspecial:] = 0.0
        logits[:, settings.LENGTH - 1] = -1e9
        logits[:, settings.LENGTH - 1, self.words.eos()] = 0.0
        return logits, None


def test_the_optimal_energy_is_recognized():
    words = dictionary()
    halves = anagrams.second_halves()
    uniform = -anagrams.HALF * math.log(len(anagrams.WORDS))

    def energy(tokens):
        texts = [[words[i] for i in row] for row in tokens[:, settings.PREFIX : 2 * anagrams.HALF].tolist()]
        return torch.tensor([uniform - anagrams.log_probability(FIRST, text) + 0.7 for text in texts])

    found = residual_measure.Enumeration(BaseByTable(words), energy, words, FIRST, halves).figures()
    assert found["log_z"] == pytest.approx(-0.7, abs=1e-4)
    assert found["base_covers"] == pytest.approx(1.0, abs=1e-4)
    assert found["kl_joint"] == pytest.approx(0.0, abs=1e-4) and found["kl_base"] > 1
    assert found["correlation"] == pytest.approx(1.0, abs=1e-4) and found["deviation"] == pytest.approx(0.0, abs=1e-3)
    nothing = residual_measure.Enumeration(BaseByTable(words), lambda tokens: torch.zeros(len(tokens)), words, FIRST, halves).figures()
    assert nothing["kl_joint"] == pytest.approx(nothing["kl_base"], abs=1e-4)
    assert nothing["deviation"] == pytest.approx(nothing["deviation_of_zero"], abs=1e-4)


def test_share_of_anagrams_reads_what_fairseq_prints():
    log = "S-0\ta b c d e\nH-0\t-1.0\te d c b a\nS-1\ta a a a a\nH-1\t-1.0\ta a a a b\nfinished\n"
    assert residual_report.share_of_anagrams(log) == 0.5


def test_all_of_it_in_small(tmp_path, capsys, monkeypatch):
    if not (Path(sys.executable).parent / "fairseq-earm-perplexity").exists():
        pytest.skip("the plugin's commands are not installed")
    residual_demo.main(["--quick", "--output", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "| perplexity per token, exact |" in printed and "BIT " in printed
    assert (tmp_path / "out" / "energies.png").stat().st_size > 1000
    with pytest.raises(SystemExit):
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "mine").write_text("keep")
        residual_demo.main(["--quick", "--output", str(tmp_path / "other")])
    assert (tmp_path / "other" / "mine").read_text() == "keep"
