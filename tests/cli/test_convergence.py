"""The command that draws cross-entropy by epoch."""
import json
import shutil

import pytest

pytest.importorskip("matplotlib")

from fairseq_earm.cli.analyse import main  # noqa: E402
from fairseq_earm.errors import UsageError  # noqa: E402
from fairseq_earm.evaluation.training_log import read_log  # noqa: E402


def draw(folder, *arguments):
    main(["convergence", *map(str, arguments), "--output", str(folder / "figure.png"), "--json", str(folder / "figure.json")])
    assert (folder / "figure.png").stat().st_size > 10_000
    return json.loads((folder / "figure.json").read_text())


def test_runs_and_seeds(logged, tmp_path, capsys):
    pytest.importorskip("tensorboard")
    shutil.copytree(logged.events, tmp_path / "run" / "events")
    report = draw(tmp_path, "--run", "E-ARM", logged.json, tmp_path / "run", "--run", "_same $x", logged.simple)
    assert report["by"] == "epoch" and "base 2" in report["unit"]
    expected = read_log(logged.json)
    for seed in (*report["runs"]["E-ARM"], *report["runs"]["_same $x"]):
        assert seed["key"] == "nll_loss" and seed["earm_from"] == 2
        assert set(seed["curves"]) == {"train", "valid", "test"}
        for kind, curve in seed["curves"].items():
            assert curve["epoch"] == [1, 2, 3]
            assert curve["cross_entropy"] == pytest.approx([record["nll_loss"] for record in expected[kind]], abs=1e-3)
    printed = capsys.readouterr().out
    assert f"E-ARM: train {expected['train'][-1]['nll_loss']:.3f} at epoch 3" in printed and "(2 seeds)" in printed


def test_by_update(logged, tmp_path):
    [seed] = draw(tmp_path, "--run", "a", logged.json, "--by", "update")["runs"]["a"]
    assert len(seed["curves"]["train"]["update"]) == len(read_log(logged.json)["train_inner"])


@pytest.mark.parametrize("arguments, says", [
    (["--run", "a"], "--run a: give a log"),
    (["--run", "a", "LOG", "--run", "a", "LOG"], "--run a is given twice"),
    (["--run", "a", "absent.log"], "absent.log: there is no such log"),
    (["--run", "a", "EMPTY"], "has no log of training in it"),
    (["--run", "a", "LOG", "--output", "figure.pdf"], "ends in .png"),
    (["--run", "a", "LOG", "--output", "absent/figure.png"], "there is no such folder"),
    (["--run", "a", "LOG", "--output", "figure.png", "--json", "absent/figure.json"], "--json absent/figure.json"),
    (["--run", "a", "INTERVALS"], "or --by update"),
    (["--run", "a", "LOG", "--run", "b", "RESIDUAL"], "--run b residual.log: of an energy network"),
])
def test_mistakes_are_one_line(logged, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "intervals.log").write_text('{"epoch": 1, "loss": "3", "num_updates": "1"}\n')
    (tmp_path / "residual.log").write_text('{"epoch": 1, "train_loss": "2", "train_nce_energy_gap": "0", "train_num_updates": "1"}\n')
    paths = {"LOG": str(logged.json), "EMPTY": "empty", "INTERVALS": "intervals.log", "RESIDUAL": "residual.log"}
    output = [] if "--output" in arguments else ["--output", "figure.png"]
    with pytest.raises(UsageError) as error:
        main(["convergence", *(paths.get(word, word) for word in arguments), *output])
    assert says in str(error.value) and "\n" not in str(error.value)
