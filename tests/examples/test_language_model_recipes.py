"""The recipes for language models: their data, the order of the experiment's commands, its table against hand-made results."""
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.examples.small_corpora import PROGRAMS, ROOT, assert_in_order, read, run, stub, write
from tests.tiny_translation import command, recorded_log

FOLDER = ROOT / "examples" / "language_model"


def load_experiment():
    """Under a name of its own: another recipe's script is called the same."""
    spec = importlib.util.spec_from_file_location("language_model_experiment", FOLDER / "british_fiction" / "experiment.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


experiment = load_experiment()


def flag(step, name):
    return flag_of(step.words, name)


def flag_of(words, name):
    return words[words.index(name) + 1]


def test_every_command_stands_behind_what_it_needs(tmp_path):
    steps = experiment.Experiment(tmp_path / "data", tmp_path / "out").steps([1, 2])
    assert_in_order(steps)
    for step in steps:
        if "." in step.name:
            assert flag(step, "--path") == str(tmp_path / "out" / step.needs[0] / "checkpoint_last.pt")
    trained = {step.name: step for step in steps if "." not in step.name}
    for name in ("cross-entropy", "control", "control-2e-3", "earm", "control-last", "earm-last"):
        for seed in (1, 2):
            branch = trained[f"{name}-seed{seed}"]
            assert branch.needs == ("start",) and flag(branch, "--max-update") == "200" and flag(branch, "--seed") == str(seed)
            assert f"--finetune-from-model={tmp_path / 'out' / 'start' / 'checkpoint_last.pt'}" in branch.words
    entries = [flag(trained[f"sweep-{stage}"], "--earm-start-update") for stage in (1, 2, 3, 4)]
    assert entries == ["0", "100", "200", "300"] and "--earm-start-update" not in trained["sweep-never"].words
    assert all(flag(trained[f"sweep-{stage}"], "--max-update") == "400" for stage in (1, 2, 3, 4, "never"))
    assert len(steps) == 3 * (1 + 2 * 6 + 5)


def result(folder, name, test, gain, dv=(), seconds=10):
    row = {
        "samples": 4, "perplexity_lower": test - 2, "perplexity_upper": test - 1, "gain": gain, "gain_standard_error": 0.001,
    }
    (folder / f"{name}.json").write_text(json.dumps({"base": {"perplexity": test + 5}, "joint": [row]}))
    (folder / f"{name}.test.log").write_text(f"INFO | Loss (base 2): 6.5, Perplexity: {test:.2f}\nfinished\n")
    lines = [f'| INFO | train_inner | {{"loss": "1", "earm_dv": "{value}"}}' for value in dv]
    lines += ['| INFO | valid | {"valid_ppl": "99.5"}', f'| INFO | train | {{"train_train_wall": "{seconds}", "train_num_updates": "50"}}']
    (folder / f"{name}.log").write_text("\n".join(lines) + "\nfinished\n")


def test_the_table_has_means_spreads_and_bounds(tmp_path, capsys):
    result(tmp_path, "start", 200.0, 0.0)
    result(tmp_path, "earm-seed1", 100.0, 0.002, dv=[9, 9, 9, 9, 9, 9, -0.25, -0.75])
    result(tmp_path, "earm-seed2", 102.0, -0.004, dv=[0.125])
    result(tmp_path, "sweep-2", 90.0, 0.01)
    result(tmp_path, "sweep-3", 80.0, 0.01)
    (tmp_path / "sweep-3.test.log").write_text("Perplexity: 80")  # not finished
    experiment.print_table(tmp_path)
    _, _, start, earm, _, _, _, sweep = capsys.readouterr().out.splitlines()
    assert start == (
        "| the start of all branches | 1 | 99.50 | 200.00 | 205.00 | 198.00 to 199.00 | +0.000 ± 0.050 |  | 0.20 |"
    )
    assert earm == (
        "| E-ARM, the paper's setting | 2 | 99.50 ± 0.00 | 101.00 ± 1.41 | 106.00 ± 1.41 | 99.00 ± 1.41 to 100.00 ± 1.41 | "
        "+0.100 ± 0.050; -0.200 ± 0.050 | -0.500; +0.125 | 0.20 |"
    )
    assert sweep.startswith("| E-ARM from stage 2 of 4 on | 1 | 99.50 | 90.00 |")


def prepare(folder, *arguments):
    environment = {"PATH": f"{PROGRAMS}:/usr/bin:/bin", "PYTHON": sys.executable}
    words = ["bash", str(FOLDER / "wikitext103" / "prepare.sh"), *map(str, arguments)]
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)


def test_wikitext_is_taken_as_it_is(tmp_path):
    lines = [" ", " = Title = ", " ", " Some words , 3 @.@ 5 of them . "]
    for split in ("train", "valid", "test"):
        write(tmp_path / "wikitext-103" / f"wiki.{split}.tokens", lines)
    done = prepare(tmp_path, "--from", "wikitext-103", "--out", "out", "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert "train: 4 lines\nvalid: 4 lines\ntest: 4 lines\n" in done.stdout
    assert [line.strip() for line in read(tmp_path / "out" / "text" / "train.tokens")] == [line.strip() for line in lines]
    assert "@.@ 1\n" in (tmp_path / "out" / "bin" / "dict.txt").read_text()
    assert prepare(tmp_path).stderr.startswith("error: --from FOLDER is missing")
    (tmp_path / "empty").mkdir()
    assert "wiki.train" in prepare(tmp_path, "--from", "empty").stderr


def readme_commands(tmp_path):
    """The commands of WikiText-103's README as argument lists, as bash expands them."""
    blocks = re.findall(r"```bash\n(.*?)```", (FOLDER / "wikitext103" / "README.md").read_text(), re.DOTALL)
    for program in ("fairseq-train", "fairseq-eval-lm", "fairseq-earm-perplexity"):
        stub(tmp_path / "stubs", program, 'printf "%s\\0" "${0##*/}" "$@" "" >> "$RECORD"\n')
    script = "\n".join(block for block in blocks if "prepare.sh" not in block)
    done = run(["bash", "-euc", script], tmp_path, path=[tmp_path / "stubs"], RECORD=str(tmp_path / "record"))
    assert done.returncode == 0, done.stderr
    return [words.split("\0") for words in (tmp_path / "record").read_text().rstrip("\0").split("\0\0")]


CUTOFFS = ["--adaptive-input-cutoff", "6,10", "--adaptive-softmax-cutoff", "6,10", "--decoder-ffn-embed-dim", 16]
SMALL = [
    *CUTOFFS, "--decoder-layers", 1, "--decoder-embed-dim", 16, "--decoder-attention-heads", 2, "--tokens-per-sample", 12, "--max-update", 1,
    "--update-freq", 1, "--cpu", "--num-workers", 0, "--disable-validation",
]
SIZES = {"TRANSFORMER": ["--decoder-input-dim", 16, "--decoder-output-dim", 16], "XL": ["--mem-len", 8]}


def test_wikitext_s_commands_run_on_a_small_text(text, tmp_path, monkeypatch):
    """Training as it stands, but for sizes; E-ARM enters at once."""
    monkeypatch.chdir(ROOT)
    trained, evaluated = {}, []
    for program, data, *arguments in readme_commands(tmp_path):
        assert data == "data/wikitext103/bin"
        arguments = [word.replace("checkpoints/", f"{tmp_path}/") for word in arguments]
        if program == "fairseq-earm-perplexity":
            assert flag_of(arguments, "--path") in trained.values()
            continue
        if program == "fairseq-eval-lm":
            with recorded_log() as records:
                command("eval_lm", text.data, *arguments, "--tokens-per-sample", 12, "--context-window", 0, "--cpu", "--num-workers", 0)
            evaluated += [record.getMessage() for record in records if "Perplexity" in record.getMessage()]
            continue
        model = Path(flag_of(arguments, "--save-dir")).parent.name
        earm = ["--earm-start-epoch", 1] if "--earm-weight" in arguments else []
        command("train", text.data, *arguments, *SMALL, *SIZES[model], *earm, "--batch-size", 4)
        trained[flag_of(arguments, "--save-dir")] = f"{flag_of(arguments, '--save-dir')}/checkpoint_best.pt"
        shutil.copy(f"{flag_of(arguments, '--save-dir')}/checkpoint_last.pt", trained[flag_of(arguments, "--save-dir")])
    assert len(trained) == 6 and len(evaluated) == 2


@pytest.mark.parametrize("name", ["", "british_fiction", "wikitext103"])
def test_every_folder_says_what_it_is(name):
    assert (FOLDER / name / "README.md").read_text().startswith("# ")
