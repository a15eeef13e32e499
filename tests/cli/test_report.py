"""The report on real tiny runs: what is on the page, and that it needs nothing else."""
import json
import os
import re
import shutil

import pytest

pytest.importorskip("matplotlib")

from fairseq_earm.cli.report import distinct_names, main  # noqa: E402
from fairseq_earm.errors import UsageError  # noqa: E402
from fairseq_earm.evaluation import report_page, run_folder  # noqa: E402
from fairseq_earm.evaluation.log_panels import PANELS, logged_keys, undrawn_keys  # noqa: E402
from fairseq_earm.evaluation.training_log import read_log  # noqa: E402
from tests.evaluation.test_page import PNG, Parsed  # noqa: E402
from tests.tiny_translation import generate  # noqa: E402


def report(tmp_path, *arguments):
    path = tmp_path / "page.html"
    main([*map(str, arguments), "--output", str(path)])
    return path.read_text(encoding="utf-8")


def is_alone(text):
    """Whether a page runs nothing, and loads nothing that it does not hold."""
    parsed = Parsed(text)
    links = [value for _, attributes in parsed.tags for name, value in attributes.items() if name in ("src", "href", "xlink:href")]
    inside = all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    loads = re.search(r"url\((?!#|\"#)|@import|javascript:", text)
    handlers = [name for _, attributes in parsed.tags for name in attributes if name.startswith("on")]
    return inside and not loads and not handlers and not parsed.named("script") and not parsed.named("link")


@pytest.fixture
def run(logged, tmp_path):
    """A copy of the tiny run's folder with its log in it."""
    folder = tmp_path / "run"
    shutil.copytree(logged.folder, folder)
    shutil.copy(logged.json, folder / "train.log")
    return folder


def test_the_page_of_one_run(run, tiny, tmp_path, capsys):
    (run / "test.out").write_text(generate(tiny, "--beam", 2), encoding="utf-8")
    (run / "grid.png").write_bytes(PNG)
    (run / "other.json").write_text('{"mine": 1}')
    text = report(tmp_path, run)
    assert is_alone(text)
    said = Parsed(text).text
    titles = ("DV bound", "Effective sample size", "sentence 4")
    for words in ("--earm-start-epoch", "--label-smoothing", "earm_cross_entropy", "torch", *titles):
        assert words in said
    assert "sentence 5" not in said and "other.json" in said
    history = read_log(run / "train.log")
    entry = next(record["num_updates"] for record in history["train_inner"] if "earm_loss" in record)
    assert f"logged from update {entry:.0f}, epoch 2" in said
    best = min(history["valid"], key=lambda record: record["nll_loss"])
    assert f"best valid{best['nll_loss']:.3f} nll_loss at update {best['num_updates']:.0f}" in said
    test = next(record for record in history["test"] if record["num_updates"] == best["num_updates"])
    assert f"test at the best valid{test['nll_loss']:.3f} nll_loss" in said
    assert len(Parsed(text).named("img")) == 1
    keys = logged_keys(history)
    drawn = [panel for panel in PANELS if any(key in keys for key, _ in panel.lines)]
    assert len(Parsed(text).named("svg")) == len(drawn) > 10
    printed = capsys.readouterr().out
    assert "run: checkpoint_last.pt" in printed and "1 generated, 1 PNG" in printed


def test_several_runs_show_where_they_differ(run, logged, tmp_path):
    pytest.importorskip("tensorboard")
    other = tmp_path / "<b>$x_"
    shutil.copytree(logged.folder, other)
    shutil.copytree(logged.events, other / "events")
    text = report(tmp_path, run, other, "--title", "<i>")
    assert is_alone(text)
    parsed = Parsed(text)
    assert parsed.named("b") == parsed.named("i") == [] and parsed.text.count("<b>$x_") > 5
    assert "Flags in which the runs differ: none." in parsed.text
    first, second = (read for read in re.findall(r"from update \d+, epoch 2", parsed.text))
    assert first == second


def test_a_run_without_energies_says_so(tmp_path):
    folder = tmp_path / "plain"
    folder.mkdir()
    (tmp_path / "plain.log").write_text('{"epoch": 1, "loss": "3", "odd": "1", "num_updates": "1"}\n')
    text = Parsed(report(tmp_path, folder)).text
    assert "plain: no E-ARM figures logged: a cross-entropy run" in text
    assert "no validation logged; no checkpoint: the settings are unknown." in text
    assert "Logged, and not drawn: odd." in text and "DV bound" not in text


def test_a_checkpoint_alone_says_that_no_log_was_found(logged, tmp_path, capsys):
    text = Parsed(report(tmp_path, logged.folder, "--name", "mine")).text
    assert "No log was found, so there are no curves: name it with --log mine FILE" in text
    assert "values in the checkpoint" in text and "no log (name it with --log mine FILE)" in capsys.readouterr().out
    text = Parsed(report(tmp_path, logged.folder, "--name", "mine", "--log", "mine", logged.simple)).text
    assert "No log was found" not in text and "DV bound" in text


def test_outputs_that_are_not_whole_are_named(run, tmp_path):
    (run / "half.out").write_text("H-1\t-1.0\ta\nD-1\t-1.0\ta\n")
    assert re.search(r"run: no samples are shown of \S+half.out: 1 of 2 sentences have no H-line", Parsed(report(tmp_path, run)).text)


def test_kinds_of_runs_have_their_own_figures():
    images = {"train": [{"loss": 1.0, "nll_loss": 2.0, "bits_per_dim": 1.0}]}
    residual = {"train": [{"loss": 1.0, "nce_energy_gap": 1.0}]}
    smoothed, plain = ({"train": [{"loss": loss, "nll_loss": 2.0, "odd": 1.0}]} for loss in (3.0, 2.0))
    keys = ("cross-entropy", "criterion", "bits_per_dim", "nce_energy_gap")
    found = [[logged_keys(history).get(key) for key in keys] for history in (images, residual, smoothed, plain)]
    assert found == [
        [None, "loss", "bits_per_dim", None], [None, "loss", None, "nce_energy_gap"], ["nll_loss", "loss", None, None],
        ["nll_loss", None, None, None],
    ]
    assert undrawn_keys(smoothed) == ("odd",)


def test_names_tell_runs_apart():
    assert distinct_names(["a/x", "b/"]) == ["x", "b"]
    assert distinct_names(["a/seed1", "b/seed1", "a/c"]) == ["a/seed1", "b/seed1", "a/c"]


@pytest.mark.parametrize("arguments, says", [
    (["absent"], "absent: there is no such folder"),
    (["EMPTY"], "has neither a checkpoint nor a log"),
    (["RUN", "RUN"], "is given twice: give each run once"),
    (["RUN", "--name", "a", "b"], "2 names for 1 runs"),
    (["RUN", "EMPTY", "--name", "a", "a"], "--name a is given twice"),
    (["RUN", "--log", "other", "FILE"], "--log other: no run has this name; the runs are run"),
    (["RUN", "--log", "run"], "--log run: give its logs"),
    (["RUN", "--log", "run", "absent.log"], "absent.log cannot be read"),
    (["RUN", "--samples", "-1"], "--samples -1"),
    (["RUN", "--output", "absent/page.html"], "--output absent/page.html: there is no such folder"),
    ([str(number) for number in range(11)], "11 runs: more than 10"),
])
def test_mistakes_are_one_line(tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    for name in ("run", "empty"):
        os.mkdir(name)
    (tmp_path / "run.log").write_text(json.dumps({"epoch": 1, "loss": "3", "num_updates": "1"}))
    with pytest.raises(UsageError) as error:
        main([{"RUN": "run", "EMPTY": "empty"}.get(word, word) for word in arguments])
    assert says in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "report.html").exists()


def test_a_log_with_numbers_of_any_kind_is_drawn(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    odd = ("nan", "1", "inf", "-5", "1e308", "2", "3")
    losses = ("1", "1e308", "-1e308", "nan", "inf", "2", "5e-324")
    keys = ("loss", "nll_loss", "gnorm", "earm_loss")
    records = [{"epoch": n, **dict.fromkeys(keys, loss), "num_updates": n} for n, loss in zip(odd, losses)]
    nowhere = [{"accuracy": "1", "loss": "1", "num_updates": "nan"}, {"bleu": "1e308", "loss": "1", "num_updates": "4"}]
    lines = [f"INFO | train_inner | {json.dumps(record)}\n" for record in [*records, *nowhere]]
    (tmp_path / "run.log").write_text("".join(lines))
    text = report(tmp_path, folder)
    assert is_alone(text) and "Gradient norm" in text


def test_a_picture_that_is_gone_when_the_page_is_written(run, tmp_path, monkeypatch):
    (run / "grid.png").write_bytes(PNG)
    found = run_folder.read_run_folder(run, "run")
    (run / "grid.png").unlink()
    monkeypatch.setattr("fairseq_earm.cli.report.read_run_folder", lambda *rest: found)
    assert "run: grid.png cannot be read." in Parsed(report(tmp_path, run)).text


class Counted(list):
    """A list that counts how often it is gone through."""

    times = 0

    def __iter__(self):
        self.times += 1
        return super().__iter__()


def test_a_long_log_is_not_gone_through_for_every_panel():
    records = Counted({"num_updates": float(n), "epoch": 1.0, "loss": 2.0} for n in range(3))
    found = run_folder.Run("run", ".", [], {"train_inner": records}, {}, None, [], [], [], [])
    report_page.report_page([found], title="x")
    assert records.times <= 40 < 2 * len(PANELS)
