"""compare.py's table against sacrebleu and against numbers worked out by hand; its commands with stubs."""
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import sacrebleu

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


def store(folder, seed, hypotheses, nll):
    run = folder / f"seed{seed}"
    run.mkdir(parents=True)
    (run / "test.log").write_text(generated(hypotheses))
    (run / "measure.json").write_text(json.dumps({**dict.fromkeys(compare_table.COLUMNS, 0.5), "nll": nll}))
    (run / "train.log").write_text("".join(
        f'2026-01-01 | INFO | train_inner | {{"num_updates": "{n}", "ups": "{ups}"}}\n' for n, ups in ((1, "0.1"), (2, "2"), (3, "4"))
    ))


def test_statistics_give_sacrebleus_corpus_score():
    rows = compare_table.sentence_statistics(generated(GOOD))
    expected = sacrebleu.corpus_bleu(GOOD, [REFERENCES], tokenize="none").score
    assert compare_table.corpus_bleu(rows.sum(0)) == pytest.approx(expected)


def test_a_lost_sentence_is_an_error():
    with pytest.raises(SystemExit, match="not every sentence"):
        compare_table.sentence_statistics(generated(GOOD).replace("D-2\t", "X-2\t"))


def test_difference_is_paired_and_its_interval_holds_it():
    good, bad = (compare_table.sentence_statistics(generated(texts)) for texts in (GOOD, BAD))
    text = compare_table.difference({"seed1": good, "seed2": good}, {"seed1": bad, "seed2": good})
    gain = (compare_table.corpus_bleu(good.sum(0)) - compare_table.corpus_bleu(bad.sum(0))) / 2
    assert text.startswith(f"{gain:+.2f} [")
    low, high = (float(bound) for bound in text[text.index("[") + 1 : text.index("]")].split(", "))
    assert low < gain < high
    assert compare_table.difference({"seed1": good}, {"seed1": good}) == "+0.00 [+0.00, +0.00], p = 1.00"
    assert compare_table.difference({"seed1": good}, {"seed2": good}) == ""


def test_table_has_mean_and_spread_of_finished_seeds(tmp_path, capsys):
    for seed, nll in ((1, 2.0), (2, 4.0)):
        store(tmp_path / "control", seed, BAD, nll)
        store(tmp_path / "earm", seed, GOOD, nll - 1)
    unfinished = tmp_path / "earm" / "seed3"
    unfinished.mkdir()
    (unfinished / "test.log").write_text("D-0\t")
    compare_table.print_table({"branches": {"control": {}, "earm": {}, "never-run": {}}}, tmp_path, "control")
    control, earm = capsys.readouterr().out.splitlines()[2:]
    assert control.startswith("| control | 2 |") and "| 3.000 ± 1.414 |" in control and control.endswith("|  | 0.50 ± 0.00 |")
    assert earm.startswith("| earm | 2 |") and "| 2.000 ± 1.414 |" in earm and "[" in earm


def test_spread_of_one_value_is_the_value():
    assert compare_table.spread([1.23456]) == "1.235"
    assert compare_table.spread([1.0, 3.0], 1) == "2.0 ± 1.4"


def test_finished_work_is_not_done_again(tmp_path, monkeypatch):
    spec = {"updates": 3, "samples": 2, "train": ["--cpu"], "generate": ["--beam", "5"],
            "branches": {"a": {"flags": ["--lr", "1"]}, "b": {"flags": ["--lr", "2"], "energy_step": "post", "updates": 7}}}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    ran = []

    def stub(words, stdout, stderr, env):
        ran.append([str(word) for word in words])
        assert env["OMP_NUM_THREADS"] == "1"
        return type("Result", (), {"returncode": 1 if "fail" in words else 0})

    monkeypatch.setattr(steps.subprocess, "run", stub)
    arguments = ["compare.py", "run", str(tmp_path / "spec.json"), "DATA", "BASE", str(tmp_path / "out"), "--seeds", "1", "2", "--jobs", "1"]
    monkeypatch.setattr(sys, "argv", arguments)
    compare.main()
    assert len(ran) == 12  # train, measure and generate for two branches with two seeds
    train = next(words for words in ran if words[0] == "fairseq-train" and words[-1] == "2")
    assert train[train.index("--max-update") + 1] == train[train.index("--total-num-update") + 1] == "7"
    assert sum("post" in words for words in ran) == 2
    ran.clear()
    (tmp_path / "out" / "b" / "seed2" / "test.log").write_text("cut off")
    compare.main()
    assert [words[0] for words in ran] == ["fairseq-generate"]
    with pytest.raises(SystemExit, match="failed with status 1"):
        steps.command(["fail"], tmp_path / "log")
    assert not steps.done(tmp_path / "log")


def test_bleu_statistics_follow_the_test_sets_order():
    rows = compare_table.sentence_statistics(generated(GOOD))
    assert np.array_equal(rows[:, 1], [len(reference.split()) for reference in REFERENCES])
