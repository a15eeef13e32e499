"""What is found of a run, in its folder and beside it."""
import argparse
import shutil
from pathlib import Path

import pytest
import torch

from fairseq_earm.errors import UsageError
from fairseq_earm.evaluation import report_tables
from fairseq_earm.evaluation.page import PNG
from fairseq_earm.evaluation.run_folder import best_record, read_run_folder, update_seconds, wall_seconds
from tests.damage import limits

RECORD = '{"epoch": 1, "loss": "3", "num_updates": "1"}\n'


@pytest.fixture
def folder(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "run.log").write_text(RECORD)
    return run


def save(path, **more):
    groups = {
        "common": {"_name": None, "seed": 7, "fp16": False},
        "model": argparse.Namespace(_name="small", seed=8, dropout=0.1),
        "criterion": {"_name": "earm_cross_entropy", "earm_weight": 0.5},
        "bpe": None,
    }
    weight = torch.zeros(3, 2)
    state = {"cfg": groups, "args": None, "model": {"a": weight, "tied": weight, "b": torch.zeros(5), "version": torch.tensor(3.0)}}
    torch.save({**state, "optimizer_history": [{"num_updates": 12}], **more}, path)


def test_a_real_run(logged):
    run = read_run_folder(logged.folder, "run", [logged.json])
    assert run.setting("criterion") == "earm_cross_entropy" and run.setting("earm_start_epoch") == 2
    assert run.setting("arch") == "transformer" and run.setting("task") == "earm_translation" and run.setting("absent") is None
    assert run.checkpoint.path.name == "checkpoint_last.pt" and run.checkpoint.updates == run.history["train"][-1]["num_updates"]
    assert run.checkpoint.values >= int(run.facts["parameters"].replace(",", ""))
    assert run.facts["begun"] == "2025-01-01 10:00" and run.facts["criterion"] == "EarmCrossEntropyCriterion"
    assert 0 < update_seconds(run.history, earm=False) and 0 < update_seconds(run.history, earm=True)
    assert wall_seconds(run.history) == run.history["train"][-1]["wall"] and run.notes == []


def test_settings_of_a_checkpoint(folder):
    save(folder / "checkpoint_best.pt")
    checkpoint = read_run_folder(folder, "run").checkpoint
    assert checkpoint.values == 11 and checkpoint.updates == 12
    assert checkpoint.settings == {
        "seed": 7, "fp16": False, "dropout": 0.1, "arch": "small", "criterion": "earm_cross_entropy", "earm_weight": 0.5,
    }
    save(folder / "checkpoint_last.pt", cfg=None, args=argparse.Namespace(arch="old", seed=3))
    assert read_run_folder(folder, "run").checkpoint.settings == {"arch": "old", "seed": 3}


def test_a_broken_checkpoint_is_passed_over_and_said(folder):
    (folder / "checkpoint_last.pt").write_bytes(b"half")
    assert read_run_folder(folder, "run").checkpoint is None
    save(folder / "checkpoint3.pt")
    run = read_run_folder(folder, "run")
    assert run.checkpoint.path.name == "checkpoint3.pt"
    assert len(run.notes) == 1 and "checkpoint_last.pt cannot be read" in run.notes[0]


def test_files_in_the_folder_and_beside_it(folder):
    generated = "S-0\ta\nT-0\tb\nH-0\t-1.0\tc\nD-0\t-1.0\tc\n"
    for name, text in {"test.log": generated, "a.json": "[1]", "b.json": "{", "no.png": "PNG", "notes.txt": "no"}.items():
        (folder / name).write_text(text)
    (folder / "grid.png").write_bytes(PNG)
    for name in ("run.out", "runner.out"):
        (folder.parent / name).write_text(generated)
    (folder.parent / "run.json").write_text("{}")
    run = read_run_folder(folder, "run")
    assert [path.name for path in run.logs] == ["run.log"]
    assert [path.name for path in run.generated] == ["test.log", "run.out"]
    assert [(path.name, content) for path, content in run.results] == [("a.json", [1]), ("run.json", {})]
    assert [path.name for path in run.pictures] == ["grid.png"]
    assert run.notes == [f"{folder / 'b.json'} is not JSON that can be read."]


def test_without_a_log_the_note_says_where_one_was_looked_for(folder):
    save(folder / "checkpoint_last.pt")
    (folder.parent / "run.log").unlink()
    run = read_run_folder(folder, "run")
    assert run.history == {} and "--log run FILE" in run.notes[0]
    shutil.copy(folder / "checkpoint_last.pt", folder.parent)
    (folder / "checkpoint_last.pt").unlink()
    with pytest.raises(UsageError, match="neither a checkpoint nor a log"):
        read_run_folder(folder, "run")


def test_figures_by_hand():
    inner = [{"num_updates": n, "wall": wall, "ups": ups} for n, wall, ups in ((1, 10, 0), (2, 20, 2), (3, 5, 4), (4, 9, 4))]
    inner[3]["earm_loss"] = 1.0
    assert wall_seconds({"train_inner": inner}) == 29
    assert wall_seconds({}) is None and update_seconds({}, earm=True) is None
    assert update_seconds({"train_inner": inner}, earm=False) == pytest.approx(1 / 3)
    assert update_seconds({"train_inner": inner}, earm=True) == 0.25
    valid = [{"nll_loss": value} for value in (2.0, float("nan"), 1.0, 3.0)]
    assert best_record({"valid": valid}, "valid", "nll_loss") == {"nll_loss": 1.0}
    assert best_record({"valid": valid}, "valid", "bleu") is None


def test_links_to_nothing_are_passed_over_and_said(folder):
    for name in ("checkpoint_last.pt", "x.json"):
        (folder / name).symlink_to(folder / "nowhere")
    for name in ("checkpoint_best.pt", "x.png"):
        (folder / name).symlink_to(folder / name)
    save(folder / "checkpoint3.pt")
    run = read_run_folder(folder, "run")
    assert run.checkpoint.path.name == "checkpoint3.pt" and run.pictures == run.results == []
    assert [note.partition(" cannot be read (")[0] for note in run.notes] == [
        str(folder / "checkpoint_last.pt"), str(folder / "checkpoint_best.pt"),
    ]


@pytest.mark.parametrize("name", ["checkpoint1.pt", "train.log", "x.json", "x.png", "x.out"])
def test_a_file_that_is_removed_after_it_was_listed(folder, name, monkeypatch):
    save(folder / "checkpoint2.pt")
    (folder / name).write_text(RECORD)
    listed = Path.glob, Path.iterdir

    def then_removed(paths):
        for path in list(paths):
            (folder / name).unlink(missing_ok=True)
            yield path

    monkeypatch.setattr(Path, "glob", lambda self, pattern: then_removed(listed[0](self, pattern)))
    monkeypatch.setattr(Path, "iterdir", lambda self: then_removed(listed[1](self)))
    run = read_run_folder(folder, "run")
    assert run.checkpoint.path.name == "checkpoint2.pt" and not run.pictures + run.results + run.generated


def test_a_folder_that_may_not_be_listed_is_one_line(folder, monkeypatch):
    def refused(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refused)
    with pytest.raises(UsageError, match=f"{folder} cannot be read: Permission denied") as error:
        read_run_folder(folder, "run")
    assert "\n" not in str(error.value)


def nested(value, times):
    for _ in range(times):
        value = [value]
    return value


def doubled(value, times):
    for _ in range(times):
        value = [value, value]
    return value


SHAPES = {  # each as a function: pytest writes out the arguments of a test that fails
    "deep": lambda: nested(1, 5000),
    "shared": lambda: doubled("x" * 1000, 40),
    "in a dict": lambda: {"a": nested({}, 5000)},
    "namespaces": lambda: (doubled(argparse.Namespace(a=1), 40),),
    "a namespace": lambda: argparse.Namespace(a=doubled(1, 40)),
    "a number": lambda: 10**5000,
    "numbers": lambda: [-(10**400)],
    "text": lambda: "x" * 10**6,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_settings_of_any_shape_are_shown_as_far_as_they_can_be(folder, shape, monkeypatch):
    """Of such a checkpoint torch reads more than it writes."""
    value = SHAPES[shape]()
    names = ("lr", "arch", "earm_weight", "earm_control", "bf16")
    cfg = {"common": {name: value for name in names}, "task": {"_name": value}, "model": {"_name": value}}
    state = {"cfg": cfg, "model": {}, "optimizer_history": [{"num_updates": value}]}
    save(folder / "checkpoint_last.pt")
    monkeypatch.setattr(torch, "load", lambda *arguments, **settings: state)
    with limits(seconds=10):
        run = read_run_folder(folder, "run")
        run.history["train_inner"].append({"earm_loss": 1.0, "num_updates": 3.0})
        html = report_tables.summary([run]) + report_tables.settings([run]) + report_tables.environment([run])
    assert run.notes == [] and "--earm-weight" in html and len(html) < 300_000


def test_lists_are_shown_as_they_are_given(folder):
    lists = {"lr": [0.1, 0.2], "none": [], "betas": ("a", (1, None)), "more": {"a": [True]}, "long": list(range(300))}
    save(folder / "checkpoint_last.pt", cfg={"common": lists})
    settings = read_run_folder(folder, "run").checkpoint.settings
    assert settings.pop("long").startswith("0, 1, 2, ") and settings == {
        "lr": "0.1, 0.2", "none": "", "betas": "a, [1, None]", "more": "[[a, [True]]]",
    }
