"""What is found of a run, in its folder and beside it."""
import argparse
import shutil

import pytest
import torch

from fairseq_earm.errors import UsageError
from fairseq_earm.evaluation.page import PNG
from fairseq_earm.evaluation.run_folder import best_record, read_run_folder, update_seconds, wall_seconds

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
