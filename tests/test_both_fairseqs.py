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
# Checkpoints then hold arrays of numpy.
BLEU = ["--eval-bleu", "--eval-bleu-args", '{"max_len_b": 5}', "--validate-interval-updates", 3]
# The two shuffle differently. With next to no gradient, moments and schedule alone say where the weights go.
GOING_ON = ["--max-update", 5, "--clip-norm", 1e-8]
PLACES = ("here", "there")


def other_python() -> Path:
    stock_here = compat._encoder_layer()[1]
    folder = ROOT / (".venv" if stock_here else ".venv-stock")
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
    """(kind of model, folder, flags) → the command that trains it for three updates."""
    data = {"tiny": tiny, "text": text, "pictures": tiny_images.build_images(tmp_path_factory.mktemp("pictures"))}

    def build(kind, folder, *more):
        if kind == "residual energy":
            found, flags, arch = text, [*tiny_energy.TASK, "--base-lm", text.base], ["--arch", "bit_tiny", *tiny_energy.SIZES]
            flags += ["--criterion", "residual_nce"]
        else:
            name, flags, arch = FAMILIES[kind]
            found, flags = data[name], [*flags, *EARM]
        bleu = kind == "encoder-decoder"
        more = ["--max-update", 3, *(BLEU if bleu else []), *more]
        return "train", train_arguments(found, folder, *flags, *more, arch=arch, validate=bleu)

    return build


@pytest.fixture(scope="module")
def runs(tiny, training, tmp_path_factory):
    """{(kind, place it began, place it went on): (folder, log of two more updates)}, and what `fairseq-generate` prints
    at each place for the encoder-decoders that began at each."""
    folder, commands = tmp_path_factory.mktemp("both"), {"here": here, "there": there}
    for place in PLACES:
        commands[place]([training(kind, folder / kind / place) for kind in KINDS])
    found, printed = {}, {}
    for place in PLACES:
        keys = [(kind, begun, place) for kind in KINDS for begun in PLACES]
        for kind, begun, _ in keys:
            shutil.copytree(folder / kind / begun, folder / kind / f"{begun}-{place}")
        going_on = [training(kind, folder / kind / f"{begun}-{place}", *GOING_ON) for kind, begun, _ in keys]
        search = [tiny.data, "--task", "earm_translation", "--cpu", "--num-workers", 0, "--max-len-b", 12, "--energy-rerank"]
        models = [folder / "encoder-decoder" / begun / "checkpoint_last.pt" for begun in PLACES]
        done = commands[place](going_on + [("generate", [*search, "--path", model]) for model in models])
        for key, (_, log) in zip(keys, done):
            found[key] = folder / key[0] / f"{key[1]}-{place}", log
        for begun, (output, _) in zip(PLACES, done[len(keys):]):
            printed[begun, place] = output
    return found, printed


def checkpoint(folder):
    return torch.load(folder / "checkpoint_last.pt", map_location="cpu", weights_only=False)


@pytest.mark.parametrize("begun", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_under_the_other(runs, kind, begun):
    """With the optimizer's moments, the learning rate's schedule and E-ARM's state."""
    found = [runs[0][kind, begun, place] for place in PLACES]
    counted = [[(entry["num_updates"], entry["lr"]) for entry in log] for _, log in found]
    assert [update for update, _ in counted[0]] == [4, 5] and counted[0] == counted[1]
    before = used_weights(checkpoint(found[0][0].parent / begun)["model"])
    states = [checkpoint(folder) for folder, _ in found]
    one, other = (used_weights(state["model"]) for state in states)
    assert one.keys() == other.keys() == before.keys()
    for name, weight in one.items():
        assert torch.allclose(weight, other[name], atol=2e-5), name
    assert max((weight - before[name]).abs().max() for name, weight in one.items()) > 1e-3
    meters = [{name for _, name, _, _ in state["extra_state"]["metrics"].get("earm_state", [])} for state in states]
    assert meters[0] == meters[1] and (kind == "residual energy" or "log_normalizer" in meters[0])


@pytest.mark.parametrize("begun", PLACES)
def test_models_generate_the_same(runs, begun):
    outputs = [runs[1][begun, place] for place in PLACES]
    lines = [tagged(output, "H") for output in outputs]
    assert len(lines[0]) == 7 and lines[0].keys() == lines[1].keys()
    for sentence, [line] in lines[0].items():
        (score, words), (other_score, other_words) = line.split("\t"), lines[1][sentence][0].split("\t")
        assert words == other_words and float(score) == pytest.approx(float(other_score), abs=1e-3)
