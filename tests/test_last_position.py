"""Commands that read the energy one step after the end, where a sentence fills all positions of the model."""
from types import SimpleNamespace

import pytest

from fairseq_earm.cli import analyse, perplexity
from fairseq_earm.errors import UsageError
from fairseq_earm.evaluation.translate import Translator
from tests.tiny_translation import generate, train

POST = ["--energy-step", "post"]


@pytest.fixture(scope="module")
def full(tiny, tmp_path_factory):
    """A model with as many learned positions as the longest translation of the test set has tokens."""
    longest = max(len(line.split()) + 1 for line in (tiny.folder / "test.tgt").read_text().splitlines())
    flags = ["--decoder-learned-pos", "--max-target-positions", longest, "--skip-invalid-size-inputs-valid-test"]
    folder = tmp_path_factory.mktemp("full")
    train(tiny, folder, *flags, "--task", "earm_translation", "--criterion", "cross_entropy", "--max-epoch", 1)
    return SimpleNamespace(data=tiny.data, a=folder / "checkpoint_last.pt", longest=longest)


def refused(command, *arguments):
    with pytest.raises(UsageError, match="--energy-step post: .* positions of the model") as error:
        command(*arguments)
    assert "\n" not in str(error.value)


def test_generation(full):
    to_the_end = ["--energy-rerank", "--beam", 2, "--max-len-b", 200, "--min-len", full.longest - 1]
    assert "H-0" in generate(full, *to_the_end)
    refused(generate, full, *to_the_end, *POST)
    shorter = ["--max-len-b", full.longest - 2, "--min-len", full.longest - 2]
    assert "H-0" in generate(full, *to_the_end, *shorter, *POST)


def test_perplexity(full, monkeypatch):
    monkeypatch.setattr(perplexity, "measure_sequence", None)  # it is said before anything is measured
    where = [full.data, "--path", full.a, "--energy", "earm", "--samples", 2, "--cpu"]
    refused(perplexity.main, [str(argument) for argument in (*where, *POST)])


def test_cases(full, tmp_path, monkeypatch):
    def to_the_end(translator, indices, *, beam):
        return [[4] * (full.longest - 1) for _ in indices]

    monkeypatch.setattr(Translator, "translate", to_the_end)
    where = ["cases", full.data, "--model", "A", full.a, "--ids", 0, 1, "--cpu", "--output", tmp_path / "cases.html"]
    analyse.main([str(argument) for argument in where])
    refused(analyse.main, [str(argument) for argument in (*where, *POST)])
