"""Training models of images by stock commands: with stock criterions, with E-ARM, without, and from a checkpoint alone."""
import json
import math
import shutil
from argparse import Namespace

import pytest
import torch
from fairseq import checkpoint_utils

from fairseq_earm.errors import UsageError
from fairseq_earm.sampling import images as image_sampling
from fairseq_earm.tasks.earm_image_modeling import EarmImageModelingConfig, EarmImageModelingTask
from tests import tiny_images
from tests.tiny_images import ARCH, SETTINGS, TASK
from tests.tiny_translation import command, recorded_log, same_state, train

EARM = ["--criterion", "earm_cross_entropy", "--earm-start-update", 0]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return tiny_images.build_images(tmp_path_factory.mktemp("pictures"))


def run(pictures, folder, *arguments, arch=ARCH, **options):
    return train(pictures, folder, *TASK, *SETTINGS, *arguments, arch=arch, **options)


def task_of(pictures, **flags):
    defaults = {name: field.default for name, field in EarmImageModelingConfig.__dataclass_fields__.items()}
    return EarmImageModelingTask.setup_task(Namespace(**{**defaults, "data": str(pictures.data), "train_subset": "train", **flags}))


def refused(call, *arguments, **options):
    with pytest.raises(UsageError) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_batch(pictures):
    task = task_of(pictures)
    task.load_dataset("test")
    dataset = task.dataset("test")
    batch = dataset.collater([dataset[0], dataset[3]])
    assert batch["target"] is batch["net_input"]["src_tokens"] and batch["target"].dtype == torch.int64
    assert batch["target"][1].tolist() == tiny_images.stripes(9, seed=2)[3].flatten().tolist()
    assert (batch["id"].tolist(), batch["nsentences"], batch["ntokens"]) == ([0, 3], 2, 32)
    assert batch["net_input"]["src_lengths"].tolist() == [16, 16] and dataset.collater([]) == {}
    assert dataset.ordered_indices().tolist() == list(range(9))
    assert (len(task.target_dictionary), task.target_dictionary.pad()) == (256, 256)


def test_evaluation_keeps_every_image(pictures, tmp_path):
    """And its bits per dimension are those of a plain pass over the images."""
    save = ["--path", pictures.base, "--batch-size", 4, "--cpu", "--valid-subset", "test", "--log-format", "json", "--num-workers", 0]
    with recorded_log() as records:
        command("validate", pictures.data, *TASK, *SETTINGS, *save)
    [line] = [record.getMessage() for record in records if record.name == "test"]
    model, task = loaded(pictures.base)
    task.load_dataset("test")
    dataset = task.dataset("test")
    values = dataset.collater([dataset[i] for i in range(9)])["target"]
    with torch.no_grad():
        log_q = model(values)[0].log_softmax(-1).gather(-1, values.unsqueeze(-1))
    assert float(json.loads(line)["test_bits_per_dim"]) == pytest.approx(-log_q.mean().item() / math.log(2), abs=1e-4)


def loaded(path, **overrides):
    models, _, task = checkpoint_utils.load_model_ensemble_and_task([str(path)], arg_overrides=overrides)
    return models[0].eval(), task


CRITERIONS = {
    "cross_entropy": [],
    "label_smoothed_cross_entropy": ["--label-smoothing", 0.1],
    "earm_cross_entropy": ["--earm-start-update", 0],
}


@pytest.mark.parametrize("criterion", CRITERIONS)
@pytest.mark.parametrize("arch", ["pixel_cnn", "gated_pixel_cnn"])
def test_every_criterion_trains_every_model(pictures, tmp_path, arch, criterion):
    sizes = ["--arch", f"{arch}_tiny", "--features", 6, "--layers", 2, "--hidden-features", 8]
    log = run(pictures, tmp_path, "--criterion", criterion, *CRITERIONS[criterion], "--max-epoch", 8, arch=sizes).log()
    bits = [entry["bits_per_dim"] for entry in log]
    assert all(math.isfinite(value) for entry in log for value in entry.values())
    assert bits[0] == pytest.approx(3, abs=0.3) and bits[-1] < bits[0] - 0.15
    if criterion == "cross_entropy":
        assert all(entry["bits_per_dim"] == pytest.approx(entry["loss"], abs=1e-3) for entry in log)
    if criterion == "earm_cross_entropy":
        assert all(entry["earm_negative_length"] == 16 and entry["earm_truncated"] == 0 for entry in log)


def test_weight_zero_is_the_stock_criterion(pictures, tmp_path):
    stock = run(pictures, tmp_path / "stock", "--criterion", "cross_entropy", "--max-update", 4)
    idle = run(pictures, tmp_path / "idle", *EARM, "--earm-weight", 0, "--max-update", 4)
    assert same_state(stock.checkpoint(), idle.checkpoint())
    assert [entry["bits_per_dim"] for entry in idle.log()] == [entry["bits_per_dim"] for entry in stock.log()]


VARIANTS = [
    ["--earm-negatives", 2],
    ["--earm-energy-steps", "last"],
    ["--earm-weight", 1, "--earm-recent-tokens", -1],
    ["--earm-normalizer-ema", 0.9],
]


@pytest.mark.parametrize("flags", VARIANTS, ids=lambda flags: " ".join(map(str, flags)))
def test_variants_train_each_in_its_own_way(pictures, tmp_path, flags):
    short = ["--max-update", 3]
    runs = [run(pictures, tmp_path / str(number), *EARM, *more, *short) for number, more in enumerate(([], flags))]
    assert not same_state(*(one.checkpoint() for one in runs))
    assert all(math.isfinite(value) for entry in runs[1].log() for value in entry.values())


def test_the_control_draws_nothing(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(image_sampling, "draw_images", None)
    log = run(pictures, tmp_path, *EARM, "--earm-control", "--max-update", 2).log()
    assert all("earm_dv" not in entry and entry["earm_loss"] > 0 for entry in log)


def test_a_resumed_run_is_the_uninterrupted_one(pictures, tmp_path):
    whole = run(pictures, tmp_path / "whole", *EARM, "--max-epoch", 3)
    for epochs in (1, 3):
        parts = run(pictures, tmp_path / "parts", *EARM, "--max-epoch", epochs)
    assert same_state(whole.checkpoint(), parts.checkpoint())


def test_a_checkpoint_is_plain_and_knows_its_shape(pictures, tmp_path):
    moved = tmp_path / "moved.pt"
    shutil.copy(pictures.base, moved)
    state = torch.load(moved, weights_only=False)
    assert state["cfg"]["task"]["image_shape"] == "4x4x1"
    assert not any("mask" in name or "criterion" in name for name in state["model"])
    model, task = loaded(moved, data=str(tmp_path / "elsewhere"))
    assert task.image_shape == (4, 4, 1) and model.decoder.levels == 8
    assert "there is no such folder" in refused(task.load_dataset, "train")


def test_mistakes_are_said_before_any_training(pictures, tmp_path):
    assert "no data" in refused(task_of, pictures, data=None)
    assert "there is no such folder" in refused(task_of, pictures, data=str(tmp_path / "none"))
    assert "--image-shape 5x4x1" in refused(task_of, pictures, image_shape="5x4x1")
    assert "split extra" in refused(task_of(pictures).load_dataset, "extra")
    assert "fairseq-earm-sample draws images" in refused(task_of(pictures).build_generator, [], None)
    start = [pictures, tmp_path / "out", "--criterion", "cross_entropy"]
    assert "--arch transformer_lm is no model of images" in refused(run, *start, arch=["--arch", "transformer_lm"])
    assert "--arch transformer is no model of images" in refused(run, *start, arch=["--arch", "transformer"])
    for flag, value in (("--earm-energy-steps", "post"), ("--earm-normalizer", "source")):
        assert f"{flag} {value}" in refused(run, *start[:2], *EARM, "--earm-negatives", 2, flag, value)
    assert "--max-tokens 15: an image has 16 values" in refused(run, *start, "--max-tokens", 15)
    assert not list((tmp_path / "out").glob("*.pt"))


def test_a_pixel_model_needs_images(text, tmp_path):
    arguments = [text, tmp_path, "--task", "language_modeling", "--criterion", "cross_entropy"]
    message = refused(train, *arguments, arch=["--arch", "pixel_cnn_tiny"])
    assert "--arch pixel_cnn_tiny is a model of images: give --task earm_image_modeling" in message
