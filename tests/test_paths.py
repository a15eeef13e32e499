"""Paths with spaces, other alphabets, and what shells and fairseq take for more than a name, in training and in every command."""
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fairseq import utils

from fairseq_earm.cli import analyse, evaluate, exposure_bias, next_token, perplexity, report, sample, sample_images, tune
from tests.tiny_energy import LENGTHS, SIZES, TASK
from tests.tiny_images import ARCH as IMAGE_ARCH
from tests.tiny_images import SETTINGS
from tests.tiny_images import TASK as IMAGE_TASK
from tests.tiny_translation import OPTIMISATION, PLUGIN, command, generate, train

NAME = "Übung 2, 数据 & $HOME=%d [x] (é) #1"
# fairseq takes it for the end of a path, unless there is something of the whole name.
COLON = "a: b"


def run(main, *arguments):
    main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def strange(text, energy, tiny, tmp_path_factory):
    """The tiny corpora and models under a strange name, and a folder to write to, with a colon too."""
    folder = tmp_path_factory.mktemp("paths") / NAME
    out = folder / COLON
    out.mkdir(parents=True)
    for name, source in (("text", text.data), ("pairs", tiny.data)):
        shutil.copytree(source, out / name)
    for name, source in (("base.pt", text.base), ("energy.pt", energy), ("a.pt", tiny.a), ("b.pt", tiny.b)):
        shutil.copy(source, out / name)
    models = {name: out / f"{name}.pt" for name in ("base", "energy", "a", "b")}
    return SimpleNamespace(folder=folder, out=out, text=out / "text", data=out / "pairs", **models)


def test_text_commands(strange):
    """Samples, training on them, perplexity, next tokens and the report."""
    store, trained = strange.out / "samples", strange.out / "trained"
    for split in ("train", "valid"):
        run(sample.main, strange.text, "--path", strange.base, "--output", store, "--gen-subset", split, *LENGTHS, "--samples", 2, "--cpu")
    arguments = [*TASK, "--criterion", "residual_nce", "--arch", "bit_tiny", *SIZES, *OPTIMISATION, "--max-epoch", 1, "--max-update", 2]
    log = ["--log-file", strange.out / "a log.log", "--tensorboard-logdir", strange.out / "tensor board"]
    command("train", strange.text, *arguments, "--negatives", store, "--base-lm", strange.base, "--save-dir", trained, *log)
    energy = ["--path", strange.base, "--energy-path", trained / "checkpoint_last.pt", "--cpu"]
    figures = strange.out / "perplexity.json"
    run(perplexity.main, strange.text, *energy, "--samples", 3, 5, "--max-sequences", 2, "--per-step", "--json", figures)
    assert json.loads(figures.read_text())["settings"]["path"] == str(strange.base)
    run(next_token.main, strange.text, *energy, "--prefix", "a b", "--top-k", 2, "--samples", 2, "--json", strange.out / "next.json")
    few = ["--max-sequences", 2, "--energy-candidates", 4, "--perplexity", figures]
    run(analyse.main, "report", strange.text, *energy, *few, "--output", strange.out / "report")
    command("train", strange.text, *arguments, "--negatives", store, "--base-lm", strange.base, "--save-dir", trained, "--max-update", 3)
    assert torch.load(trained / "checkpoint_last.pt", weights_only=False)["optimizer_history"][-1]["num_updates"] == 3
    run(report.main, trained, "--log", "trained", strange.out / "a log.log", "--output", strange.out / "page.html")
    assert (strange.out / "page.html").stat().st_size and (strange.out / "report" / "report.json").stat().st_size


def test_translation_commands(strange):
    """Training, translating, tuning, evaluating, exposure bias and cases."""
    run_folder = strange.out / "earm"
    arguments = ["--task", "earm_translation", "--criterion", "earm_cross_entropy", "--earm-start-epoch", 1, "--max-update", 2]
    train(SimpleNamespace(data=strange.data), run_folder, *arguments, validate=True)
    assert (run_folder / "checkpoint_last.pt").exists()
    (strange.out / "list").write_text(generate(strange, "--energy-rerank", "--beam", 3, "--nbest", 3))
    (strange.out / "one").write_text(generate(strange, "--beam", 3))
    recipe = ["--generated-energy-weight", 1, "--generated-lenpen", 1, "--resamples", 3]
    run(tune.main, strange.out / "list", *recipe, "--sacrebleu-tokenize", "none", "--json", strange.out / "tuned.json")
    system = ["--system", NAME, strange.out / "one", "--metrics", "bleu", "--resamples", 3]
    run(evaluate.main, *system, "--latex", strange.out / "table.tex", "--json", strange.out / "scores.json")
    models = ["--path", strange.a, "--against", strange.b, "--gen-subset", "valid", "--pairs", 3, "--cpu"]
    run(exposure_bias.main, strange.data, *models, "--json", strange.out / "bias.json", "--plot", strange.out / "bias.png")
    cases = ["--model", NAME, strange.a, "--system", "one", strange.out / "one", "--sentences", 2, "--cpu"]
    run(analyse.main, "cases", strange.data, *cases, "--output", strange.out / "cases.html")
    lines = strange.out / "texts.txt", strange.out / "other texts.txt"
    for number, path in enumerate(lines):
        path.write_text("".join(f"{number} one two three four {line}\n" for line in range(9)))
    run(analyse.main, "ab-export", *lines, "--items", 3, "--checks", 1, "--output", strange.out / "which: is it.html")
    key = json.loads((strange.out / "which: is it.key.json").read_text())
    (strange.out / "answers.json").write_text(json.dumps({"page": key["page"], "rater": NAME, "answers": {}}))
    run(analyse.main, "ab-test", strange.out / "answers.json", strange.out / "which: is it.key.json", "--json", strange.out / "votes.json")
    run(report.main, run_folder, "--name", NAME, "--output", strange.out / "page 2.html")
    assert NAME.replace("&", "&amp;") in (strange.out / "page 2.html").read_text()


def test_images(tmp_path):
    """Training on an archive of images, and drawing some."""
    pytest.importorskip("matplotlib")
    folder = tmp_path / NAME / COLON
    folder.mkdir(parents=True)
    np.savez(folder / "some images.npz", train=np.random.default_rng(1).integers(0, 256, (40, 4, 4), dtype=np.uint8))
    arguments = [*IMAGE_TASK, *SETTINGS, *IMAGE_ARCH, *OPTIMISATION, "--max-update", 1, "--criterion", "earm_cross_entropy", "--earm-start-epoch", 1]
    command("train", folder, *arguments, "--disable-validation", "--save-dir", folder / "run")
    checkpoint = folder / "run" / "checkpoint_last.pt"
    run(sample_images.main, "--path", checkpoint, "--output", folder / "drawn ä.png", "--samples", 2, "--cpu")
    assert (folder / "drawn ä.png").stat().st_size


def test_several_paths_are_several_still(tmp_path):
    for name in ("a", "b", "a:b/c"):
        (tmp_path / name).mkdir(parents=True)
    one, other = str(tmp_path / "a"), str(tmp_path / "b")
    assert utils.split_paths(f"{one}:{other}") == [one, other]
    assert utils.split_paths(str(tmp_path / "a:b" / "c")) == [str(tmp_path / "a:b" / "c")]


def test_user_dir(strange):
    """The plugin itself, in a process that has it from nowhere else."""
    plugin = strange.folder / COLON / "plug in" / "fairseq_earm"
    plugin.parent.mkdir()
    os.symlink(PLUGIN, plugin)
    code = "from fairseq_cli.train import cli_main; cli_main()"
    arguments = [strange.data, "--user-dir", plugin, "--save-dir", strange.out / "other run", "--arch", "transformer_tiny", *OPTIMISATION]
    arguments += ["--task", "earm_translation", "--criterion", "earm_cross_entropy", "--earm-start-epoch", 1, "--max-update", 1, "--disable-validation"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=strange.folder, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (strange.out / "other run" / "checkpoint_last.pt").exists()
