"""The recipes on images: the order of their commands, the table against hand-made results, and how drawing is timed."""
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from fairseq_earm.sampling.images import draw_images
from tests.examples.small_corpora import ROOT, assert_in_order
from tests.tiny_images import tiny_pixel_model

FOLDER = ROOT / "examples" / "image"


def load(path):
    """A script as a module of its own: other examples have scripts of the same name."""
    spec = importlib.util.spec_from_file_location(f"image_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


experiment = load(FOLDER / "mnist" / "experiment.py")
sampling_speed = load(FOLDER / "sampling_speed.py")


def test_every_command_stands_behind_what_it_needs(tmp_path):
    steps = experiment.Experiment(tmp_path / "data", tmp_path / "out").steps([1, 2])
    names = assert_in_order(steps)
    for step in steps:
        used = [word for word in step.words if word.endswith("checkpoint_last.pt")]
        assert {Path(word).parent.name for word in used} == set(step.needs)
    # A base and three branches with two learning rates each, for two seeds, each of them measured; and three pictures.
    assert len(names) == 2 * 2 * 7 + 3


def test_branches_have_equal_updates_from_one_base(tmp_path):
    steps = {step.name: step.words for step in experiment.Experiment(tmp_path / "data", tmp_path / "out").steps([5])}
    for branch in ("cross-entropy", "control", "earm"):
        words = steps[f"{branch}-3e-4-5"]
        last = {flag: words[len(words) - 1 - words[::-1].index(flag) + 1] for flag in ("--max-update", "--batch-size", "--lr")}
        assert last == {"--max-update": "100", "--batch-size": "64", "--lr": "3e-4"}
        assert words[words.index("--finetune-from-model") + 1].endswith("base-5/checkpoint_last.pt")
    assert "--earm-control" in steps["control-3e-4-5"] and "--earm-control" not in steps["earm-3e-4-5"]


def write_results(folder, name, valid, test, dv=None):
    entries = {"valid": {"valid_bits_per_dim": str(valid)}, "test": {"test_bits_per_dim": str(test)}}
    lines = [f"2026 | INFO | {split} | {json.dumps(entry)}\n" for split, entry in entries.items()]
    (folder / f"{name}.measure.log").write_text("".join([*lines, "finished\n"]))
    entry = {"epoch": 1, "train_loss": "1.0", **({} if dv is None else {"train_earm_dv": str(dv)})}
    (folder / f"{name}.log").write_text(f"2026 | INFO | train | {json.dumps(entry)}\nfinished\n")


def test_the_table_has_each_branch_at_its_best_learning_rate(tmp_path, capsys):
    write_results(tmp_path, "base-1", 1.5, 1.4)
    for seed, test in ((1, 1.2), (2, 1.3)):
        write_results(tmp_path, f"earm-1e-3-{seed}", 1.0, test, dv=0.01 * seed)
        write_results(tmp_path, f"earm-3e-4-{seed}", 1.1, 0.5, dv=9)
    experiment.print_table(tmp_path)
    base, earm = capsys.readouterr().out.splitlines()[2:]
    assert base == "| base |  | 1 | 1.5000 | 1.4000 |  |"
    assert earm == "| E-ARM | 1e-3 | 2 | 1.0000 ± 0.0000 | 1.2500 ± 0.0707 | 0.0150 ± 0.0071 |"


def test_both_ways_of_drawing_draw_the_same():
    decoder = tiny_pixel_model("gated_pixel_cnn", (2, 2, 3), levels=5).decoder
    torch.manual_seed(4)
    whole = sampling_speed.whole_passes(decoder, 3, 12)
    torch.manual_seed(4)
    assert torch.equal(draw_images(decoder, 3)[0], whole)


def test_speed_is_measured_case_by_case(monkeypatch, capsys):
    small = {"features": 4, "layers": 1, "hidden": 4, "first_size": 3, "size": 3}
    monkeypatch.setattr(sampling_speed, "CASES", {"tiny": (sampling_speed.GatedPixelCnn, (3, 3, 1), small)})
    [(whole, kept)] = sampling_speed.measure(2, 2).values()
    assert whole > 0 and kept > 0


@pytest.mark.parametrize("name", ["image", "image/mnist"])
def test_every_folder_says_what_it_is(name):
    assert (ROOT / "examples" / name / "README.md").read_text().startswith("# ")
