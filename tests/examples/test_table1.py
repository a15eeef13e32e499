"""The eight combinations of Table 1: their flags, short trainings of all of them, and one followed to its row in the table."""
import itertools
import json
import re
import shlex
import sys

import pytest

from tests.examples.small_corpora import RECIPES, prepared, write_splits
from tests.tiny_translation import command

sys.path.insert(0, str(RECIPES))

import compare  # noqa: E402

FOLDER = RECIPES / "table1"
SPEC = json.loads((FOLDER / "branches.json").read_text())
SMALL = [
    "--encoder-embed-dim", "16", "--decoder-embed-dim", "16", "--encoder-ffn-embed-dim", "16", "--decoder-ffn-embed-dim", "16",
    "--encoder-layers", "1", "--decoder-layers", "1", "--max-tokens", "256", "--num-workers", "0",
]


def value(flags, flag, default):
    return flags[flags.index(flag) + 1] if flag in flags else default


def factors(flags):
    """Label smoothing, scheduled sampling, and cross-entropy, E-ARM or its control."""
    energy = value(flags, "--criterion", "") == "earm_cross_entropy"
    smoothing = float(value(flags, "--label-smoothing", "0")) > 0
    return smoothing, "--scheduled-sampling" in flags, (energy + ("--earm-control" in flags))


def test_all_combinations_are_there_and_named_after_their_factors():
    found = {name: factors(branch["flags"]) for name, branch in SPEC["branches"].items()}
    assert sorted(found.values()) == sorted(itertools.product((False, True), (False, True), range(3)))
    for name, (smoothing, scheduled, energy) in found.items():
        words = ["ls"] * smoothing + ["ss"] * scheduled + ["earm"] * (energy == 1) + ["control"] * (energy == 2)
        assert name == ("-".join(words) or "ce")


def test_combinations_differ_in_nothing_but_their_factors():
    """Each factor is the same flags in every branch that has it; learning rates are the controls' and the others'."""
    for kind in (1, 2):
        branches = [branch["flags"] for branch in SPEC["branches"].values() if factors(branch["flags"])[2] == kind]
        own = [[word for word in flags if word not in ("0", "0.1")] for flags in branches if not factors(flags)[1]]
        assert own[0] == own[1]
        assert {value(flags, "--lr", "") for flags in branches} == {"3e-4" if kind == 1 else "1e-4"}
    schedules = [[word for word in branch["flags"] if "scheduled" in word] for branch in SPEC["branches"].values()]
    assert len({tuple(flags) for flags in schedules if flags}) == 1


def test_every_row_with_energy_is_compared_with_its_own_control():
    """And a control with the row that it adds likelihood terms to."""
    for name, (smoothing, scheduled, energy) in ((name, factors(branch["flags"])) for name, branch in SPEC["branches"].items()):
        if energy:
            other = factors(SPEC["branches"][SPEC["branches"][name]["against"]]["flags"])
            assert other == (smoothing, scheduled, 2 if energy == 1 else 0)
    beams = {name: int(value(flags, "--beam", "")) for name, flags in SPEC["generate"].items()}
    assert beams == {"beam-1": 1, "beam-5": 5}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Data, and a checkpoint that one update was made for."""
    folder = tmp_path_factory.mktemp("table1")
    write_splits(folder / "raw")
    prepared("multi30k", folder, "--from", "raw", "--out", "data")
    flags = ["--criterion", "cross_entropy", "--lr", "1e-3", "--max-update", 1, "--save-dir", folder / "base", "--no-epoch-checkpoints"]
    command("train", folder / "data" / "bin", *SPEC["train"], *SMALL, *flags, "--total-num-update", 1, "--disable-validation")
    return folder / "data" / "bin", folder / "base" / "checkpoint_last.pt"


@pytest.mark.parametrize("name", SPEC["branches"])
def test_every_branch_trains_from_the_start(start, tmp_path, name):
    data, checkpoint = start
    run = [f"--finetune-from-model={checkpoint}", "--save-dir", tmp_path, "--max-update", 2, "--total-num-update", 2, "--no-epoch-checkpoints"]
    command("train", data, *SPEC["train"], *SPEC["branches"][name]["flags"], *SMALL, *run, "--disable-validation", "--no-progress-bar")
    assert (tmp_path / "checkpoint_last.pt").is_file()


def test_a_branch_becomes_a_row_of_the_table(start, tmp_path, monkeypatch, capsys):
    small = {**SPEC, "updates": 3, "samples": 2, "train": [*SPEC["train"], *SMALL, "--log-interval", "1"]}
    (tmp_path / "spec.json").write_text(json.dumps(small))
    where = [tmp_path / "spec.json", *start, tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", list(map(str, ["compare.py", "run", *where, "--branches", "ls-ss-earm", "--seeds", 1])))
    compare.main()
    titles, *_, row = capsys.readouterr().out.splitlines()[-3:]
    assert row.startswith("| ls-ss-earm | 1 |") and "BLEU beam-1" in titles and "BLEU beam-5" in titles
    monkeypatch.setattr(sys, "argv", list(map(str, ["compare.py", "table", tmp_path / "spec.json", tmp_path / "out"])))
    compare.main()
    assert capsys.readouterr().out.splitlines() == [titles, *_, row]


def test_the_readmes_commands_are_taken(monkeypatch):
    [block] = re.findall(r"```bash\n(.*?)```", (FOLDER / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    commands, taken = shlex.split(block.replace("\\\n", " ")), []
    monkeypatch.chdir(RECIPES.parents[1])
    for name in ("run", "table"):
        monkeypatch.setattr(compare, name, taken.append)
    starts = [i for i, word in enumerate(commands) if word == "python"] + [len(commands)]
    for begin, end in zip(starts, starts[1:]):
        monkeypatch.setattr(sys, "argv", commands[begin + 1 : end])
        compare.main()
    run, table = taken
    assert run.spec.resolve() == table.spec.resolve() == FOLDER / "branches.json"
    assert run.output == table.output and run.against is table.against is None
