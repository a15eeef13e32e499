"""The residual recipe on novels: preparing a small text, the order of its commands, and its table against hand-made results."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.examples.small_corpora import PROGRAMS, ROOT, assert_in_order, read, write

FOLDER = ROOT / "examples" / "residual_ebm" / "british_fiction"
sys.path.insert(0, str(FOLDER))

import experiment  # noqa: E402
import log_ratio  # noqa: E402


def prepare(folder, *arguments):
    environment = {"PATH": f"{PROGRAMS}:/usr/bin:/bin", "PYTHON": sys.executable}
    words = ["bash", str(FOLDER / "prepare.sh"), *map(str, arguments)]
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_first_sentences_are_tokenized_and_binarized(tmp_path):
    lines = [f"\u201cWell-known words\u201d, said No. {n}." for n in range(30)]
    for split in ("train", "valid", "test"):
        write(tmp_path / "novels" / f"{split}.txt", lines)
    result = prepare(tmp_path, 20, "--from", "novels", "--out", "out", "--workers", 1)
    assert result.returncode == 0, result.stderr
    assert "train: 20 lines\nvalid: 30 lines\n" in result.stdout
    text = [line.replace("@@ ", "") for line in read(tmp_path / "out" / "text" / "train.txt")]
    assert text[0] == '" Well @-@ known words , " said No. 0 .'
    assert (tmp_path / "out" / "bin" / "train.bin").exists()


def test_what_is_missing_is_said(tmp_path):
    assert prepare(tmp_path).stderr.startswith("error: --from FOLDER is missing")
    assert prepare(tmp_path, "many", "--from", ".").stderr == "error: SENTENCES is not a positive number: many\n"


def test_every_command_stands_behind_what_it_needs(tmp_path):
    steps = experiment.Experiment(tmp_path / "data", tmp_path / "out").steps([1, 2])
    names = assert_in_order(steps)
    for step in steps:
        used = [word for word in step.words if word.endswith("checkpoint_best.pt")]
        assert {Path(word).parent.name for word in used} == set(step.needs) or "perplexity" in step.name
    for name in ("base", "unit", "bit-mlm"):
        assert {f"{name}-1.perplexity", f"{name}-2.perplexity"} <= set(names)


def test_the_table_has_bounds_spread_and_gains(tmp_path, capsys):
    (tmp_path / "base-1.json").write_text(json.dumps({"base": {"perplexity": 100.0}}))
    for seed, lower in ((1, 90.0), (2, 92.0)):
        row = {"perplexity_lower": lower, "perplexity_upper": lower + 1, "gain": 0.1, "gain_standard_error": 0.01}
        (tmp_path / f"unit-{seed}.json").write_text(json.dumps({"base": {"perplexity": 100.0}, "joint": [{}, row]}))
    experiment.print_table(tmp_path)
    base, unit = capsys.readouterr().out.splitlines()[2:]
    assert base == "| BASE LM | 1 | 100.00 |  |"
    assert unit == "| joint UNIT, started from BALM | 2 | 91.00 ± 1.41 to 92.00 ± 1.41 | 0.1000 ± 0.0100; 0.1000 ± 0.0100 |"


@pytest.mark.parametrize("name", ["residual_ebm", "residual_ebm/british_fiction", "residual_ebm/synthetic"])
def test_every_folder_says_what_it_is(name):
    assert (ROOT / "examples" / name / "README.md").read_text().startswith("# ")


def test_the_log_ratio_is_an_energy(text, tmp_path):
    """A model knows nothing that it does not know itself; one that has learnt the text tells it from an untrained model's."""
    same = log_ratio.log_ratio(str(text.data), str(text.base), str(text.base), 20, prefix=4, length=12)
    assert same == {"nce_loss": pytest.approx(2), "nce_accuracy_data": 0, "nce_accuracy_negatives": 0}
    state = torch.load(text.base, weights_only=False)
    state["model"] = {name: torch.zeros_like(weight) for name, weight in state["model"].items()}
    torch.save(state, tmp_path / "uniform.pt")
    learnt = log_ratio.log_ratio(str(text.data), str(tmp_path / "uniform.pt"), str(text.base), 20, prefix=4, length=12)
    assert learnt["nce_loss"] < 1 and min(learnt["nce_accuracy_data"], learnt["nce_accuracy_negatives"]) > 0.8
