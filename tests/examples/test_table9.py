"""Top-K resampling: its rows and their table, its commands with stubs, and one model translated for real in every way."""
import json
import re
import shlex
import sys

import pytest

from fairseq_earm.errors import UsageError
from tests.examples.small_corpora import RECIPES, assert_in_order
from tests.examples.test_compare import BAD, GOOD, rows_of, stored
from tests.tiny_translation import build, generate, tagged

sys.path[:0] = [str(RECIPES), str(RECIPES / "table9")]

import steps  # noqa: E402
import top_k  # noqa: E402


def test_every_row_with_energy_has_its_candidates_without():
    rows = {row.name: row for row in top_k.rows()}
    assert len(rows) == len(top_k.rows())
    for row in rows.values():
        if row.weight in ("", "0"):
            assert row.without is None
            continue
        control = rows[row.without]
        if row.name.startswith("beam"):  # its stock order is that of weight 0
            assert row.flags[:2] == control.flags and control.weight == ""
        else:
            assert control.weight == "0" and (control.candidates, control.chosen) == (row.candidates, row.chosen)
            assert control.flags[:-1] == row.flags[:-1]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """top_k.main with commands that leave translations; returns the command lines that it ran."""
    (tmp_path / "data").mkdir()
    for seed in (1, 2):
        (tmp_path / f"earm{seed}.pt").write_text("")
    ran = []

    def stub(words, stdout, stderr, env):
        ran.append(list(map(str, words)))
        better = "--energy-rerank" in words and words[words.index("--energy-weight") + 1] != "0"
        stored(tmp_path / "stub", GOOD if better else BAD)
        stdout.write((tmp_path / "stub").read_text().replace("finished\n", ""))
        return type("Result", (), {"returncode": 0})

    def main(*arguments):
        ran.clear()
        monkeypatch.setattr(sys, "argv", ["top_k.py", *map(str, arguments)])
        monkeypatch.chdir(tmp_path)
        top_k.main()
        return list(ran)

    monkeypatch.setattr(steps.subprocess, "run", stub)
    return main


def test_what_is_finished_is_not_done_again_and_the_table_follows(run, tmp_path, capsys):
    arguments = ["run", "data", "out", "--seeds", 1, 2, "--jobs", 1, "--models", "earm=earm{seed}.pt"]
    ran = run(*arguments)
    assert len(ran) == 2 * len(top_k.rows())
    assert all(f"--path=earm{words[words.index('--seed') + 1]}.pt" in words for words in ran)
    printed = rows_of(capsys)[-len(top_k.rows()):]
    for row, cells in zip(top_k.rows(), printed):
        assert cells[:4] == [row.candidates, row.chosen, row.weight, "2"]
        assert cells[5].startswith("+" if row.without else "") and bool(cells[5]) == bool(row.without)
    (tmp_path / "out" / "earm" / "seed2" / "top5-drawn-1.log").write_text("cut off")
    [words] = run(*arguments)
    assert words[words.index("--sampling-topk") + 1] == "5" and words[words.index("--energy-select") + 1] == "resample"
    capsys.readouterr()
    assert run("table", "out") == [] and rows_of(capsys)[1:] == printed


def test_steps_have_names_of_their_own(tmp_path):
    (tmp_path / "a.pt").write_text("")
    assert_in_order(top_k.steps(tmp_path, tmp_path / "out", {"a": str(tmp_path / "a.pt"), "b": str(tmp_path / "a.pt")}, [1, 2], "last"))


@pytest.mark.parametrize("arguments, message", [
    (["run", "data", "out", "--models", "earm=nowhere{seed}.pt"], "no checkpoint nowhere1.pt"),
    (["run", "elsewhere", "out", "--models", "earm=earm1.pt"], "elsewhere: no such folder"),
    (["table", "out"], "out holds no results"),
])
def test_what_is_missing_is_one_clear_line(run, arguments, message):
    with pytest.raises(UsageError, match=message) as error:
        run(*arguments)
    assert "\n" not in str(error.value)


def test_a_model_without_a_name_is_refused(run, capsys):
    with pytest.raises(SystemExit):
        run("run", "data", "out", "--models", "earm1.pt")
    assert "'earm1.pt' is not NAME=PATH" in capsys.readouterr().err


def test_the_readmes_commands_are_taken(monkeypatch):
    [block] = re.findall(r"```bash\n(.*?)```", (top_k.ROOT / "examples/translation/table9/README.md").read_text(encoding="utf-8"), re.DOTALL)
    taken = []
    monkeypatch.setattr(top_k, "run_experiment", lambda args, steps, table: taken.append(args))
    for line in block.replace("\\\n", " ").splitlines():
        monkeypatch.setattr(sys, "argv", shlex.split(line)[1:])
        top_k.main()
    command, table = taken
    assert command.output == table.output and dict(command.models).keys() == {"earm", "control"}
    branches = json.loads((RECIPES / "multi30k" / "branches.json").read_text())["branches"]
    assert all(path.split("/")[-3] in branches for _, path in command.models)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return build(tmp_path_factory.mktemp("table9"))


def test_weight_changes_the_choice_and_not_the_candidates(tiny):
    """What the control stands on: the same seed gives the same candidates, whatever the weight and the way of choosing."""
    lists = {}
    for row in top_k.rows():
        if row.name.startswith(("top5-", "beam10")):
            printed = generate(tiny, *row.flags, *([] if "--nbest" in row.flags else ["--nbest", 10]), "--seed", 3)
            lists[row.name] = {n: [line.split("\t")[1] for line in lines] for n, lines in tagged(printed, "D").items()}
    for kind in ("top5", "beam10"):
        first, *others = (found for name, found in lists.items() if name.startswith(kind))
        assert all({n: sorted(texts) for n, texts in found.items()} == {n: sorted(texts) for n, texts in first.items()} for found in others)
        assert any(found != first for found in others)
