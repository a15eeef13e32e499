"""Checkpoints go from stock fairseq to the fork of its last main and back: runs go on, models generate the same.

Needs an environment with the other fairseq than the one that runs the tests: `make test` and `make test-stock` make one
each, and FAIRSEQ_EARM_OTHER_PYTHON may name the interpreter of another.
"""
from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fairseq_earm import compat
from tests import tiny_energy, tiny_images
from tests.test_family_training import EARM, FAMILIES
from tests.tiny_translation import Run, command, recorded_log, tagged, train_arguments, used_weights

ROOT = Path(__file__).resolve().parents[1]
KINDS = [*FAMILIES, "residual energy"]
# The same sentences in every batch, and nothing by chance but negatives: both versions of torch draw them alike.
CERTAIN = ["--required-batch-size-multiple", 1, "--dropout", 0, "--max-update", 3]
# Checkpoints then hold arrays of numpy.
BLEU = ["--eval-bleu", "--eval-bleu-args", '{"max_len_b": 5}', "--validate-interval-updates", 3]
# Recent fairseq orders sentences by seed and epoch; stock fairseq does where it is asked to.
OF_STOCK = ["--update-ordered-indices-seed"]
FIGURES = ("loss", "earm_dv", "earm_log_normalizer", "nce_energy_gap", "num_updates", "lr", "gnorm")
PLACES = ("here", "there")


def stock_place() -> str:
    """Where stock fairseq is: it alone has the encoders' fast path."""
    return "here" if compat._encoder_layer()[1] else "there"


def other_python() -> Path:
    folder = ROOT / (".venv" if stock_place() == "here" else ".venv-stock")
    return Path(os.environ.get("FAIRSEQ_EARM_OTHER_PYTHON", folder / "bin" / "python"))


pytestmark = pytest.mark.skipif(
    not other_python().exists(), reason=f"no environment with the other fairseq ({other_python()})"
)


def here(commands):
    """[(printed, log)] of `fairseq-{name}` commands under the fairseq that runs the tests."""
    done = []
    for name, arguments in commands:
        with recorded_log() as records:
            printed = command(name, *arguments)
        done.append([printed, Run(None, records).log()])
    return done


def there(commands):
    """The same under the other one."""
    text = json.dumps([[name, list(map(str, arguments))] for name, arguments in commands])
    run = [str(other_python()), "-m", "tests.run_commands"]
    done = subprocess.run(run, cwd=ROOT, input=text, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def training(tiny, text, tmp_path_factory):
    """(kind of model, folder, place, flags) → the command that trains it there."""
    data = {"tiny": tiny, "text": text, "pictures": tiny_images.build_images(tmp_path_factory.mktemp("pictures"))}

    def build(kind, folder, place, *more):
        if kind == "residual energy":
            found, flags, arch = text, [*tiny_energy.TASK, "--base-lm", text.base], ["--arch", "bit_tiny", *tiny_energy.SIZES]
            flags += ["--criterion", "residual_nce"]
        else:
            name, flags, arch = FAMILIES[kind]
            found, flags = data[name], [*flags, *EARM]
        certain = [flag for flag in CERTAIN if kind != "pixel_cnn" or flag not in ("--dropout", 0)]  # it has none
        bleu = kind == "encoder-decoder"
        more = [*(BLEU if bleu else []), *(OF_STOCK if place == stock_place() else []), *more]
        return "train", train_arguments(found, folder, *flags, *certain, *more, arch=arch, validate=bleu)

    return build


@pytest.fixture(scope="module")
def runs(tiny, training, tmp_path_factory):
    """{(kind, place it began, place it went on): (folder, log after three updates)}, and what `fairseq-generate` prints
    at each place for the encoder-decoders that began at each."""
    folder, commands = tmp_path_factory.mktemp("both"), {"here": here, "there": there}
    for place in PLACES:
        commands[place]([training(kind, folder / kind / place, place) for kind in KINDS])
    found, printed = {}, {}
    for place in PLACES:
        keys = [(kind, begun, place) for kind in KINDS for begun in PLACES]
        for kind, begun, _ in keys:
            shutil.copytree(folder / kind / begun, folder / kind / f"{begun}-{place}")
        going_on = [training(kind, folder / kind / f"{begun}-{place}", place, "--max-update", 5) for kind, begun, _ in keys]
        search = [tiny.data, "--task", "earm_translation", "--cpu", "--num-workers", 0, "--max-len-b", 12, "--energy-rerank"]
        models = [folder / "encoder-decoder" / begun / "checkpoint_last.pt" for begun in PLACES]
        done = commands[place](going_on + [("generate", [*search, "--path", model]) for model in models])
        for key, (_, log) in zip(keys, done):
            found[key] = folder / key[0] / f"{key[1]}-{place}", log
        for begun, (output, _) in zip(PLACES, done[len(keys):]):
            printed[begun, place] = output
    return found, printed


@pytest.mark.parametrize("begun", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_under_the_other(runs, kind, begun):
    """With the optimizer's moments, the learning rate's schedule and E-ARM's state: it ends where it would have at home."""
    found = [runs[0][kind, begun, place] for place in PLACES]
    logs = [[{key: entry[key] for key in FIGURES if key in entry} for entry in log] for _, log in found]
    assert [entry["num_updates"] for entry in logs[0]] == [4, 5]
    for one, other in zip(*logs):
        assert one == pytest.approx(other, rel=2e-3, abs=2e-3)
    states = [torch.load(folder / "checkpoint_last.pt", map_location="cpu", weights_only=False) for folder, _ in found]
    one, other = (used_weights(state["model"]) for state in states)
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert torch.allclose(weight, other[name], atol=2e-4), name


@pytest.mark.parametrize("begun", PLACES)
def test_models_generate_the_same(runs, begun):
    outputs = [runs[1][begun, place] for place in PLACES]
    lines = [tagged(output, "H") for output in outputs]
    assert len(lines[0]) == 7 and lines[0].keys() == lines[1].keys()
    for sentence, [line] in lines[0].items():
        (score, words), (other_score, other_words) = line.split("\t"), lines[1][sentence][0].split("\t")
        assert words == other_words and float(score) == pytest.approx(float(other_score), abs=1e-3)
