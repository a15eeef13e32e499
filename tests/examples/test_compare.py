"""compare.py's table against sacrebleu and against numbers worked out by hand; its commands with stubs."""
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import sacrebleu

from fairseq_earm.errors import UsageError
from fairseq_earm.evaluation.text_scores import corpus_bleu

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "translation"
sys.path.insert(0, str(FOLDER))

import compare  # noqa: E402
import compare_table  # noqa: E402
import steps  # noqa: E402

REFERENCES = ["a dog runs over the green grass", "two men play chess in a park", "a child eats", "the red car is very fast today"]
GOOD = ["a dog runs over the green grass", "two men play chess in the park", "a child eats", "the red car is fast today"]
BAD = ["a cat runs over green grass", "two men in the park", "the child sleeps", "a red car is fast"]


def generated(hypotheses):
    """What fairseq-generate prints of some translations, out of order, as compare.py stores it."""
    lines = []
    for i in reversed(range(len(hypotheses))):
        lines += [f"S-{i}\tx", f"T-{i}\t{REFERENCES[i]}", f"H-{i}\t-0.5\tx", f"D-{i}\t-0.5\t{hypotheses[i]}"]
    return "\n".join([*lines, "finished", ""])


def stored(log, hypotheses):
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(generated(hypotheses))
    return log


def store(folder, seed, hypotheses, nll, logs=("test",)):
    run = folder / f"seed{seed}"
    for name in logs:
        stored(run / f"{name}.log", hypotheses)
    (run / "measure.json").write_text(json.dumps({**dict.fromkeys(compare_table.COLUMNS, 0.5), "nll": nll}))
    (run / "train.log").write_text("".join(
        f'2026-01-01 | INFO | train_inner | {{"num_updates": "{n}", "ups": "{ups}"}}\n' for n, ups in ((1, "0.1"), (2, "2"), (3, "4"))
    ))


def rows_of(capsys):
    """The cells of the printed table's rows, title row first."""
    lines = capsys.readouterr().out.splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line]


@pytest.fixture
def statistics(tmp_path):
    return {name: compare_table.sentence_statistics(stored(tmp_path / name, texts)) for name, texts in (("good", GOOD), ("bad", BAD))}


def test_statistics_give_sacrebleus_corpus_score(statistics):
    expected = sacrebleu.corpus_bleu(GOOD, [REFERENCES], tokenize="none").score
    assert corpus_bleu(statistics["good"].sum(0)) == pytest.approx(expected)


def test_statistics_follow_the_test_sets_order(statistics):
    assert np.array_equal(statistics["good"][:, 1], [len(reference.split()) for reference in REFERENCES])


def test_a_lost_sentence_or_reference_is_an_error(tmp_path):
    log = stored(tmp_path / "test.log", GOOD)
    log.write_text(generated(GOOD).replace("D-2\t", "X-2\t"))
    with pytest.raises(UsageError, match="1 of 4 sentences have no D-line"):
        compare_table.sentence_statistics(log)
    log.write_text(generated(GOOD).replace("T-", "X-"))
    with pytest.raises(UsageError, match="no references"):
        compare_table.sentence_statistics(log)


def test_difference_is_paired_and_its_interval_holds_it(statistics):
    good, bad = statistics["good"], statistics["bad"]
    text = compare_table.difference({"seed1": good, "seed2": good, "seed3": bad}, {"seed1": bad, "seed2": good})
    gain = (corpus_bleu(good.sum(0)) - corpus_bleu(bad.sum(0))) / 2
    assert text.startswith(f"{gain:+.2f} [")
    low, high = (float(bound) for bound in text[text.index("[") + 1 : text.index("]")].split(", "))
    assert low < gain < high
    assert compare_table.difference({"seed1": good}, {"seed1": good}) == "+0.00 [+0.00, +0.00], p = 1.00"
    assert compare_table.difference({"seed1": good}, {"seed2": good}) == ""


def test_table_has_mean_and_spread_of_finished_seeds(tmp_path, capsys):
    for seed, nll in ((1, 2.0), (2, 4.0)):
        store(tmp_path / "control", seed, BAD, nll)
        store(tmp_path / "earm", seed, GOOD, nll - 1)
    stored(tmp_path / "earm" / "seed3" / "test.log", GOOD).write_text("D-0\t")
    spec = {"generate": ["--beam", "5"], "branches": {"control": {}, "earm": {}, "never-run": {}}}
    compare_table.print_table(spec, tmp_path, "control")
    titles, control, earm = rows_of(capsys)
    assert titles[-3:] == ["BLEU", "against control", "s/update"]
    assert control[:2] == ["control", "2"] and control[3] == "3.000 ± 1.414" and control[-2:] == ["", "0.50 ± 0.00"]
    assert earm[:2] == ["earm", "2"] and earm[3] == "2.000 ± 1.414" and earm[-2].startswith("+")
    compare_table.print_table(spec, tmp_path)
    assert [row[:-2] + row[-1:] for row in (titles, control, earm)] == rows_of(capsys)
    with pytest.raises(UsageError, match="--against never-run"):
        compare_table.print_table(spec, tmp_path, "never-run")
    with pytest.raises(UsageError, match="elsewhere has no results"):
        compare_table.print_table(spec, tmp_path / "elsewhere")


def test_every_way_to_generate_has_its_columns(tmp_path, capsys):
    """A branch is compared with its own opponent where it names one, and a seed counts when all ways are finished."""
    spec = {
        "generate": {"beam-1": [], "beam-5": []}, "against": "ce",
        "branches": {"ce": {}, "control": {}, "earm": {"against": "control"}, "earm-2": {"against": "never-run"}, "never-run": {}},
    }
    for name, texts in (("ce", BAD), ("control", BAD), ("earm", GOOD), ("earm-2", GOOD)):
        store(tmp_path / name, 1, texts, 2.0, ["test-beam-1", "test-beam-5"])
        store(tmp_path / name, 2, texts, 9.0, ["test-beam-1"])
    stored(tmp_path / "earm" / "seed1" / "test-beam-1.log", BAD)
    (tmp_path / "ce" / "seed1" / "train.log").write_text("killed before its first interval\n")
    compare_table.print_table(spec, tmp_path)
    titles, ce, control, earm, other = rows_of(capsys)
    assert titles[-5:] == ["BLEU beam-1", "against", "BLEU beam-5", "against", "s/update"]
    assert {row[1] for row in (ce, control, earm, other)} == {"1"} and ce[-1] == "" and control[-1] == "0.50"
    assert ce[-4] == ce[-2] == "" and control[-4] == "ce: +0.00 [+0.00, +0.00], p = 1.00"
    assert earm[-4] == "control: +0.00 [+0.00, +0.00], p = 1.00" and earm[-2].startswith("control: +") and earm[-2] > "control: +1"
    assert other[-4] == other[-2] == ""
    compare_table.print_table(spec, tmp_path, "earm")
    assert rows_of(capsys)[0][-4] == "against earm"


def test_spread_of_one_value_is_the_value():
    assert compare_table.spread([1.23456]) == "1.235"
    assert compare_table.spread([1.0, 3.0], 1) == "2.0 ± 1.4"


SPEC = {
    "updates": 3, "samples": 2, "train": ["--cpu"], "generate": ["--beam", "5"],
    "branches": {"a": {"flags": ["--lr", "1"]}, "b": {"flags": ["--lr", "2"], "energy_step": "post", "updates": 7}},
}


@pytest.fixture
def stubbed(tmp_path, monkeypatch):
    """compare.main on a spec, with commands that leave their results; returns the command lines."""
    ran = []
    (tmp_path / "data").mkdir()
    (tmp_path / "base.pt").write_text("")

    def stub(words, stdout, stderr, env):
        words = [str(word) for word in words]
        ran.append(words)
        assert env["OMP_NUM_THREADS"] == "1"
        if words[0] == "fairseq-generate":
            stdout.write(generated(GOOD).replace("finished\n", ""))
        elif "measure" in words:
            Path(words[words.index("measure") + 3]).write_text(json.dumps(dict.fromkeys(compare_table.COLUMNS, 0.5)))
        return type("Result", (), {"returncode": 1 if "fail" in words else 0})

    def main(spec, *arguments, checkpoint="base.pt"):
        (tmp_path / "spec.json").write_text(spec if isinstance(spec, str) else json.dumps(spec))
        where = ["spec.json", "data", checkpoint, "out"]
        monkeypatch.setattr(sys, "argv", ["compare.py", "run", *where, "--jobs", "1", *map(str, arguments)])
        monkeypatch.chdir(tmp_path)
        ran.clear()
        compare.main()
        return list(ran)

    monkeypatch.setattr(steps.subprocess, "run", stub)
    return main


def value(words, flag):
    return words[words.index(flag) + 1]


def test_finished_work_is_not_done_again(stubbed, tmp_path, capsys):
    ran = stubbed(SPEC, "--seeds", 1, 2)
    assert len(ran) == 12  # train, measure and generate for two branches with two seeds
    train = next(words for words in ran if words[0] == "fairseq-train" and words[-1] == "2")
    assert value(train, "--max-update") == value(train, "--total-num-update") == "7"
    assert "--finetune-from-model=base.pt" in train and "--no-save-optimizer-state" in train
    assert sum("post" in words for words in ran) == 2
    assert [row[:2] for row in rows_of(capsys)[-2:]] == [["a", "2"], ["b", "2"]]
    (tmp_path / "out" / "b" / "seed2" / "test.log").write_text("cut off")
    ran = stubbed(SPEC, "--seeds", 1, 2)
    assert [words[0] for words in ran] == ["fairseq-generate"] and value(ran[0], "--seed") == "2"
    with pytest.raises(SystemExit, match="failed with status 1"):
        steps.command(["fail"], tmp_path / "log")
    assert not steps.done(tmp_path / "log")


def test_ways_to_generate_are_skipped_one_by_one(stubbed, tmp_path):
    spec = {**SPEC, "generate": {"beam-1": ["--beam", "1"], "beam-5": ["--beam", "5"]}, "branches": {"a": {"flags": []}}}
    ran = stubbed(spec, "--seeds", 1)
    assert [value(words, "--beam") for words in ran if words[0] == "fairseq-generate"] == ["1", "5"]
    (tmp_path / "out" / "a" / "seed1" / "test-beam-1.log").write_text("cut off")
    assert [value(words, "--beam") for words in stubbed(spec, "--seeds", 1)] == ["1"]


@pytest.mark.parametrize("checkpoint", ["-", "base.pt"])
def test_a_training_cut_off_goes_on_from_its_own_checkpoint_or_begins_again(stubbed, tmp_path, checkpoint):
    """From the beginning, fairseq's checkpoint has all that a resume needs; without the optimizer's state it must go."""
    spec = {**SPEC, "branches": {"a": {"flags": []}}, "epochs": 4}
    del spec["updates"]
    own = tmp_path / "out" / "a" / "seed1" / "checkpoint_last.pt"
    own.parent.mkdir(parents=True)
    own.write_text("")
    (own.parent / "train.log").write_text("cut off")
    train = stubbed(spec, "--seeds", 1, checkpoint=checkpoint)[0]
    assert value(train, "--max-epoch") == "4" and not {"--max-update", "--total-num-update"} & set(train)
    assert own.exists() == (checkpoint == "-")
    assert ("--no-save-optimizer-state" in train) == any("finetune" in word for word in train) == (checkpoint != "-")


def without(key):
    return {name: content for name, content in SPEC.items() if name != key}


@pytest.mark.parametrize("spec, arguments, message", [
    ("no JSON", [], "spec.json cannot be read as JSON"),
    ("[1]", [], "has no train, generate, samples, branches"),
    (without("generate"), [], "has no generate"),
    (without("branches"), [], "has no branches"),
    (without("updates"), [], "branch a has neither updates nor epochs"),
    ({**SPEC, "epochs": 2}, [], "branch a has both updates and epochs"),
    ({**SPEC, "branches": {"a": {}}}, [], "branch a has no flags"),
    ({**SPEC, "branches": {"a/b": {"flags": []}}}, [], "a/b names files"),
    ({**SPEC, "generate": {"beam/1": []}}, [], "beam/1 names files"),
    ({**SPEC, "against": "c"}, [], "against: c is no branch of the spec; it has a, b"),
    (SPEC, ["--branches", "a", "c"], "--branches: c is no branch of the spec; it has a, b"),
    (SPEC, ["--against", "c"], "--against: c is no branch"),
])
def test_a_spec_that_cannot_be_run_is_one_clear_line(stubbed, tmp_path, spec, arguments, message):
    with pytest.raises(UsageError, match=message) as error:
        stubbed(spec, *arguments)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing, message", [("data", "data: no such folder"), ("base.pt", "base.pt: no such checkpoint.*or give -")])
def test_missing_files_are_one_clear_line(stubbed, tmp_path, missing, message):
    (tmp_path / missing).rename(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=message):
        stubbed(SPEC)


def test_the_recipes_specs_are_sound():
    for path in sorted(FOLDER.glob("*/branches.json")):
        assert compare.read_spec(path)["branches"]
