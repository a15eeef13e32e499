"""What training leaves behind is plain fairseq: any fairseq reads it, generates with it and goes on from it."""
import os
import pickletools
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from fairseq.dataclass.utils import merge_with_parent
from omegaconf import DictConfig

from fairseq_earm import compat
from fairseq_earm.compat_versions import parse
from fairseq_earm.criterions.earm_config import EarmCrossEntropyConfig
from tests.tiny_translation import generate, tagged, train, train_arguments

ROOT = Path(__file__).resolve().parents[1]
EARM = ["--criterion", "earm_cross_entropy", "--earm-start-epoch", 1, "--earm-warmup-updates", 2, "--earm-normalizer-ema", 0.9]


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """A run of three updates with all of E-ARM's state in its checkpoint."""
    return train(tiny, tmp_path_factory.mktemp("trained"), *EARM, "--max-update", 3)


def bare(name, cwd, *arguments, path=""):
    """Run `fairseq-{name}` in a process that knows nothing of the plugin; `path` is where it may be installed.

    torch from 2.6 on refuses every checkpoint of fairseq (they hold an argparse.Namespace), which only the plugin mends:
    without it, the user has to force torch to read them. And a thread that makes batches ahead may abort a run that ends.
    """
    environment = {**os.environ, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1", "PYTHONPATH": str(path)}
    run = [sys.executable, "-c", f"from fairseq_cli.{name} import cli_main; cli_main()", *map(str, arguments)]
    done = subprocess.run(run, cwd=cwd, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


def pickled_names(path):
    """All classes and functions that a checkpoint names."""
    with zipfile.ZipFile(path) as archive:
        [inside] = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        operations = list(pickletools.genops(archive.read(inside)))
    assert "STACK_GLOBAL" not in {operation.name for operation, _, _ in operations}
    return {argument.replace(" ", ".") for operation, argument, _ in operations if operation.name == "GLOBAL"}


def shapes(checkpoint):
    return {name: (weight.shape, weight.dtype) for name, weight in checkpoint["model"].items()}


def test_the_checkpoint_is_made_of_what_stock_ones_are_made_of(tiny, tmp_path, trained):
    stock = train(tiny, tmp_path, "--criterion", "label_smoothed_cross_entropy", "--max-update", 3)
    assert trained.checkpoint().keys() == stock.checkpoint().keys()
    assert trained.checkpoint()["extra_state"].keys() == stock.checkpoint()["extra_state"].keys()
    assert trained.checkpoint()["criterion"] is None
    assert shapes(trained.checkpoint()) == shapes(stock.checkpoint())
    ours, theirs = (pickled_names(run.folder / "checkpoint_last.pt") for run in (trained, stock))
    # The moving normaliser is kept in double precision.
    assert ours - theirs <= {"torch.DoubleStorage"}
    assert "argparse.Namespace" in theirs


@pytest.mark.skipif(
    compat._encoder_layer()[1] and parse(torch.__version__) >= (1, 13),
    reason="stock fairseq's own fast path fails on torch from 1.13 on; only the plugin avoids it",
)
def test_fairseq_generates_without_the_plugin(tiny, tmp_path, trained):
    path = trained.folder / "checkpoint_last.pt"
    search = ["--beam", 4, "--nbest", 4, "--gen-subset", "test", "--max-len-b", 12, "--required-batch-size-multiple", 1]
    printed = bare("generate", tmp_path, tiny.data, "--path", path, "--task", "translation", "--cpu", *search)
    tiny_with_it = type(tiny)(data=tiny.data, a=path)
    ours = generate(tiny_with_it, "--beam", 4, "--nbest", 4, "--energy-rerank", "--energy-weight", 0)
    assert len(tagged(ours, "H")) == 7
    assert [tagged(printed, tag) for tag in "STHDP"] == [tagged(ours, tag) for tag in "STHDP"]


def test_fairseq_goes_on_training_without_the_plugin(tiny, tmp_path, trained):
    """Under another criterion fairseq asks for a new optimizer; the averages of the metrics go on, the plugin's too."""
    stock = ["--criterion", "label_smoothed_cross_entropy", "--reset-optimizer", "--max-update", 2, "--data-buffer-size", 0]
    restore = ["--restore-file", trained.folder / "checkpoint_last.pt"]
    printed = bare("train", tmp_path, *train_arguments(tiny, tmp_path / "on", *stock, *restore))
    assert f"Loaded checkpoint {trained.folder}" in printed
    again = train(tiny, tmp_path / "again", *EARM, "--reset-optimizer", "--max-update", 1,
                  "--restore-file", tmp_path / "on" / "checkpoint_last.pt")
    meters = [dict((name, meter) for _, name, _, meter in run.checkpoint()["extra_state"]["metrics"]["earm_state"])
              for run in (trained, again)]
    assert meters[0]["first_update"] == meters[1]["first_update"]


@pytest.fixture
def installed(tmp_path):
    """The package as pip installs it, from a copy because building leaves files behind."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "fairseq_earm", source / "fairseq_earm", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "setup.py", source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", tmp_path / "site", source], check=True, timeout=180)
    return tmp_path / "site"


HYDRA = [
    "task=translation", "task.source_lang=src", "task.target_lang=tgt", "optimizer=adam", "optimization.lr=[0.01]",
    "dataset.batch_size=32", "dataset.num_workers=0", "dataset.data_buffer_size=0",
    "dataset.disable_validation=true", "common.cpu=true",
    "common.log_format=json", "common.log_interval=1", "optimization.max_update=2",
    "+model._name=transformer", "++model.encoder.layers=1", "++model.decoder.layers=1", "++model.encoder.embed_dim=16",
    "++model.decoder.embed_dim=16", "++criterion._name=earm_cross_entropy", "++criterion.earm_start_update=1",
]


def test_hydra_trains_with_the_installed_package(tiny, tmp_path, installed):
    where = [f"task.data={tiny.data}", f"common.user_dir={installed / 'fairseq_earm'}", f"checkpoint.save_dir={tmp_path / 'out'}"]
    printed = bare("hydra_train", tmp_path, *HYDRA, *where, path=installed)
    updates = [line for line in printed.splitlines() if "train_inner" in line and '"loss"' in line]
    assert ['"earm_dv"' in line for line in updates] == [False, True]
    assert (tmp_path / "out" / "checkpoint_last.pt").exists()


@pytest.mark.parametrize("flag, value", [("earm_sampler", "beam"), ("earm_energy_steps", "first"), ("earm_normalizer", "none")])
def test_a_choice_that_is_none_is_refused(tiny, tmp_path, capsys, flag, value):
    with pytest.raises(Exception, match=value):
        merge_with_parent(EarmCrossEntropyConfig(), DictConfig({"_name": "earm_cross_entropy", flag: value}))
    with pytest.raises(SystemExit):
        train(tiny, tmp_path, *EARM, f"--{flag.replace('_', '-')}", value)
    assert f"invalid choice: '{value}'" in capsys.readouterr().err
