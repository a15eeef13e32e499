"""The sweep of start epochs: its branches, one of them trained from the beginning and once more after it was cut off, its README."""
import json
import re
import shlex
import sys

from tests.examples.small_corpora import RECIPES, prepared, write_splits
from tests.examples.test_table1 import SMALL, value

sys.path.insert(0, str(RECIPES))

import compare  # noqa: E402

FOLDER = RECIPES / "table4"
SPEC = json.loads((FOLDER / "branches.json").read_text())


def test_branches_differ_in_their_start_and_each_has_its_control():
    branches = {name: branch["flags"] for name, branch in SPEC["branches"].items()}
    starts = [name.split("-")[1] for name in branches if name.startswith("earm-")]
    assert all(1 <= int(start) <= SPEC["epochs"] for start in starts)
    assert list(branches) == ["never", *(f"{kind}-{start}" for start in starts for kind in ("earm", "control"))]
    for start in starts:
        flags = branches[f"earm-{start}"]
        assert value(flags, "--earm-start-epoch", "") == start
        assert branches[f"control-{start}"] == [*flags, "--earm-control"]
        assert SPEC["branches"][f"earm-{start}"]["against"] == f"control-{start}"
        place = flags.index("--earm-start-epoch") + 1
        first = branches[f"earm-{starts[0]}"]
        assert [*flags[:place], *flags[place + 1 :]] == [*first[:place], *first[place + 1 :]]


def run(monkeypatch, folder, spec):
    (folder / "spec.json").write_text(json.dumps(spec))
    where = [folder / "spec.json", folder / "data" / "bin", "-", folder / "out"]
    monkeypatch.setattr(sys, "argv", list(map(str, ["compare.py", "run", *where, "--branches", "earm-1", "--seeds", 1, "--jobs", 1])))
    compare.main()


def test_a_training_that_was_cut_off_goes_on_after_its_last_epoch(tmp_path, monkeypatch, capsys):
    write_splits(tmp_path / "raw")
    prepared("multi30k", tmp_path, "--from", "raw", "--out", "data")
    small = {**SPEC, "epochs": 1, "samples": 2, "train": [*SPEC["train"], *SMALL, "--log-interval", "1"]}
    run(monkeypatch, tmp_path, small)
    capsys.readouterr()
    (tmp_path / "out" / "earm-1" / "seed1" / "train.log").write_text("cut off")
    run(monkeypatch, tmp_path, {**small, "epochs": 2})
    log = (tmp_path / "out" / "earm-1" / "seed1" / "train.log").read_text()
    assert "Loaded checkpoint" in log and "begin training epoch 2" not in log.split("Loaded checkpoint")[0]
    assert '"epoch": 1' not in log and "earm_dv" in log  # the second epoch alone
    assert capsys.readouterr().out.splitlines()[-1].startswith("| earm-1 | 1 |")


def test_the_readmes_commands_are_taken(monkeypatch):
    [block] = re.findall(r"```bash\n(.*?)```", (FOLDER / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    taken = []
    monkeypatch.chdir(RECIPES.parents[1])
    for name in ("run", "table"):
        monkeypatch.setattr(compare, name, taken.append)
    for line in block.replace("\\\n", " ").splitlines():
        monkeypatch.setattr(sys, "argv", shlex.split(line)[1:])
        compare.main()
    command, table = taken
    assert command.spec.resolve() == table.spec.resolve() == FOLDER / "branches.json"
    assert command.checkpoint == compare.BEGINNING and command.output == table.output
