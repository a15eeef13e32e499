"""A disk that is full or may not be written to: one line that names the path and the remedy, and nothing is lost."""
from __future__ import annotations

import json
import shutil

import pytest
import torch
from fairseq import checkpoint_utils

from fairseq_earm import compat_saving
from fairseq_earm.cli import analyse, evaluate, perplexity, sample, tune
from fairseq_earm.errors import UsageError
from tests.faults.disks import SmallDisk, no_file_above
from tests.faults.killing import leftovers
from tests.faults.test_kills import EARM, write_nbest
from tests.tiny_translation import same_state, train

TRAINING = [*EARM, "--task", "earm_translation", "--batch-size", 96, "--save-interval-updates", 1]
MEGABYTE = 2**20


@pytest.fixture
def disk(tmp_path):
    mounted = SmallDisk(tmp_path / "disk", 4 * MEGABYTE)
    yield mounted
    mounted.unmount()


@pytest.fixture
def no_pause(monkeypatch):
    monkeypatch.setattr(compat_saving, "PAUSE", 0)


def refusal(run, *args):
    with pytest.raises(UsageError) as error:
        run(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    """Folder of a run that nothing befell, and the size of its checkpoints."""
    folder = tmp_path_factory.mktemp("undisturbed")
    train(tiny, folder, *TRAINING, "--max-update", 6)
    return folder, max(path.stat().st_size for path in folder.glob("*.pt"))


def checkpoint(folder, name="checkpoint_last.pt"):
    return torch.load(folder / name, map_location="cpu", weights_only=False)


def refused_training(tiny, folder, refuse):
    """A run of two updates, and one to go on with it that is refused room; its message. All that was there is still whole."""
    train(tiny, folder, *TRAINING, "--max-update", 2)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with refuse:
        message = refusal(lambda: train(tiny, folder, *TRAINING, "--max-update", 6))
    for name, content in before.items():
        assert (folder / name).read_bytes() == content, name
    assert leftovers(folder) == []
    return message


@pytest.mark.parametrize("checkpoints", [0.5, 1.5], ids=["while-it-is-written", "while-it-is-copied"])
def test_training_on_a_disk_that_fills_up(tiny, disk, undisturbed, no_pause, checkpoints):
    folder, (expected, size) = disk.folder / "run", undisturbed

    class Full:
        def __enter__(self):
            disk.fill(int(checkpoints * size))

        def __exit__(self, *_):
            disk.empty()

    message = refused_training(tiny, folder, Full())
    name = "checkpoint_1_3.pt" if checkpoints < 1 else "checkpoint_last.pt"
    assert f"{folder / name} cannot be written: No space left on device" in message
    assert "the checkpoint written before it is whole: make room or leave to write, and start the same command again" in message
    train(tiny, folder, *TRAINING, "--max-update", 6)
    assert same_state(checkpoint(folder), checkpoint(expected))


def test_training_where_files_may_not_be_that_large(tiny, tmp_path, undisturbed, no_pause):
    """The same without a small disk."""
    expected, size = undisturbed
    message = refused_training(tiny, tmp_path / "run", no_file_above(size // 2))
    assert "checkpoint_1_3.pt cannot be written: File too large; the checkpoint written before it is whole" in message
    train(tiny, tmp_path / "run", *TRAINING, "--max-update", 6)
    assert same_state(checkpoint(tmp_path / "run"), checkpoint(expected))


def test_a_disk_that_has_room_again_at_the_second_attempt(tmp_path, monkeypatch, caplog):
    """fairseq appends the second attempt to what the first one left, and calls it a checkpoint."""
    state = {"model": torch.arange(50000.0)}
    path = str(tmp_path / "checkpoint.pt")
    torch.save({"model": torch.zeros(1)}, path)
    attempts = []

    def make_room(_):
        attempts.append(1)
        refuse.__exit__(None, None, None)

    monkeypatch.setattr(compat_saving.time, "sleep", make_room)
    refuse = no_file_above(100000)
    with refuse:
        checkpoint_utils.torch_persistent_save(state, path)
    assert attempts == [1] and "attempt 2 of 3 follows" in caplog.text
    assert torch.equal(torch.load(path)["model"], state["model"]) and leftovers(tmp_path) == []


def test_what_is_no_fault_of_the_disk_is_not_called_one(tmp_path):
    with pytest.raises(Exception, match="pickle"):
        checkpoint_utils.torch_persistent_save({"model": lambda: 0}, str(tmp_path / "checkpoint.pt"))
    assert list(tmp_path.iterdir()) == []


def test_training_where_nothing_may_be_written(tiny, disk):
    train(tiny, disk.folder, *TRAINING, "--max-update", 2)
    before = {path.name: path.read_bytes() for path in disk.folder.iterdir()}
    disk.allow_writing(False)
    for folder in (disk.folder, disk.folder / "new"):
        message = refusal(lambda: train(tiny, folder, *TRAINING, "--max-update", 6))
        assert f"--save-dir {folder} cannot be written: Read-only file system; make room or leave to write" in message
    assert {path.name: path.read_bytes() for path in disk.folder.iterdir()} == before
    disk.allow_writing(True)
    assert train(tiny, disk.folder, *TRAINING, "--max-update", 3).log()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "filling"}


def test_sampling_and_perplexity_go_on_when_there_is_room_again(text, disk, tmp_path, capsys):
    lengths = ["--cpu", "--prefix-length", "8", "--sequence-length", "12", "--samples", "20"]
    model = [str(text.data), "--path", str(text.base)]
    drawing = [*model, *lengths, "--batch-size", "4", "--gen-subset", "train", "--output"]
    measuring = [*model, *lengths, "--energy", "earm", "--per-step", "--json"]
    for main, words, name in ((sample.main, drawing, "samples"), (perplexity.main, measuring, "out.json")):
        main([*words, str(tmp_path / name)])
        disk.fill(16 * 1024 if name == "samples" else 4096)
        message = refusal(main, [*words, str(disk.folder / name)])
        assert f"{words[-1]} {disk.folder / name}" in message and "No space left on device" in message
        assert "start the same command again" in message and " kept" in message
        disk.allow_writing(False)
        message = refusal(main, [*words, str(disk.folder / name)])
        assert f"{words[-1]} {disk.folder}" in message and ("Read-only file system" in message or "may not be written to" in message)
        disk.allow_writing(True)
        disk.empty()
        main([*words, str(disk.folder / name)])
    assert contents(disk.folder / "samples") == contents(tmp_path / "samples")
    assert json.loads((disk.folder / "out.json").read_text()) == json.loads((tmp_path / "out.json").read_text())
    assert leftovers(disk.folder) == []


def commands(text_of, folder, tmp_path):
    """(main, words before the file, flag, name of the file) of commands that write a file at their end."""
    nbest = tmp_path / "nbest.txt"
    write_nbest(nbest, sentences=4)
    logs = tmp_path / "train.log"
    logs.write_text("".join(
        f'2025-01-01 10:00:00 | INFO | {tag} | {{"epoch": {epoch}, "{tag}_loss": "3.0", "{tag}_nll_loss": "2.0", '
        f'"{tag}_num_updates": "{5 * epoch}"}}\n' for epoch in (1, 2) for tag in ("train", "valid")
    ))
    tuning = [str(nbest), "--generated-energy-weight", "1", "--generated-lenpen", "1", "--resamples", "9", "--lenpen", "1"]
    scoring = ["--system", "a", str(nbest), "--metrics", "bleu", "--tokenize", "none"]
    curves = ["convergence", "--run", "a", str(logs)]
    return {
        "tune": (tune.main, tuning, "--json", "out.json"),
        "evaluate": (evaluate.main, scoring, "--json", "out.json"),
        "evaluate-latex": (evaluate.main, scoring, "--latex", "out.tex"),
        "convergence": (analyse.main, curves, "--output", "out.png"),
    }


@pytest.mark.parametrize("name", ["tune", "evaluate", "evaluate-latex", "convergence", "report"])
def test_files_of_results(name, text, disk, tmp_path, capsys):
    """Read-only: refused before any work. Full: in one line, with the former file as it was."""
    pytest.importorskip("matplotlib")
    if name == "report":
        from fairseq_earm.cli import report

        main, words, flag, file = report.main, [str(text.base.parent)], "--output", "out.html"
    else:
        main, words, flag, file = commands(text, disk.folder, tmp_path)[name]
    path = disk.folder / file
    path.write_text("former")
    words = [*words, flag, str(path)]
    disk.allow_writing(False)
    capsys.readouterr()
    assert f"{flag} {path} cannot be written: {disk.folder} may not be written to; give another" in refusal(main, words)
    assert capsys.readouterr().out == ""
    disk.allow_writing(True)
    disk.fill()
    message = refusal(main, words)
    assert f"{flag} {path} cannot be written: No space left on device; make room or leave to write" in message
    assert path.read_text() == "former" and sorted(one.name for one in disk.folder.iterdir()) == ["filling", file]
    disk.empty()
    main(words)
    assert path.read_bytes() != b"former" and path.stat().st_size > 20
