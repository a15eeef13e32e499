import json
import sys

import numpy as np
import pytest
import sacrebleu

from fairseq_earm.cli.evaluate import main
from fairseq_earm.evaluation.significance import paired_bootstrap
from fairseq_earm.evaluation.text_scores import bleu_statistics, corpus_bleu
from tests.tiny_translation import generate, tagged

REFERENCES = ["a b c d e .", "f g h , i", "j k l m n o p q ."]
GOOD = ["a b c d x .", "f g h , i", "j k l m n o"]
BAD = ["b a", "f g h i", "j k m l ."]
WORSE = ["x", "f g h i", "j k m l n o ."]


@pytest.fixture
def write(tmp_path):
    def write(name, lines, references=None):
        """Plain text, or with references what fairseq-generate prints."""
        if references is not None:
            both = enumerate(zip(lines, references))
            lines = [f"T-{i}\t{r}\nH-{i}\t-0.5\t{h}\nD-{i}\t-0.5\t{h}\nP-{i}\t-1.0" for i, (h, r) in both]
        path = tmp_path / name
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return str(path)

    return write


def evaluate(capsys, *arguments):
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def test_bleu_by_length_by_hand(write, tmp_path, capsys):
    report = tmp_path / "report.json"
    one, two = write("one", GOOD, REFERENCES), write("two", BAD)
    output = evaluate(
        capsys, "--system", "a", one, two, "--bins", 6, 10, "--metrics", "bleu", "--tokenize", "none", "--json", report
    )
    bins = json.loads(report.read_text())["bleu_by_length"]
    # References of 6, 5 and 9 tokens: the bin from 6 holds the first and the last.
    assert [(each["low"], each["high"], each["sentences"]) for each in bins] == [(0, 6, 1), (6, 10, 2), (10, None, 0)]
    # Five of six words and all of six; of pairs 3 + 5, of three 2 + 4, of four 1 + 3; 12 words for 15.
    expected = 100 * np.exp(1 - 15 / 12) * (11 / 12 * 8 / 10 * 6 / 8 * 4 / 6) ** (1 / 4)
    assert bins[1]["bleu"]["a"]["seeds"][0] == pytest.approx(expected)
    # "f g h i": all words, two pairs of three, one triple of two; no four of one, which counts for half a match; 4 words for 5.
    other = 100 * np.exp(1 - 5 / 4) * (4 / 4 * 2 / 3 * 1 / 2 * 0.5 / 1) ** (1 / 4)
    assert bins[0]["bleu"]["a"]["seeds"] == pytest.approx([100, other])
    assert bins[0]["bleu"]["a"]["standard_deviation"] == pytest.approx((100 - other) / 2**0.5)
    assert bins[2]["bleu"]["a"] is None
    lines = output.splitlines()
    row = lines[lines.index("BLEU by target length, in tokens") + 1 :]
    assert row[0].split("  ")[-3:] == ["", "[6, 10)", "[10, ∞)"] and row[1].split() == ["sentences", "1", "2", "0"]
    assert row[2].split() == ["a", f"{50 + other / 2:.2f}", "±", f"{(100 - other) / 2**0.5:.2f}", *row[2].split()[4:7], "-"]


def test_scores_and_differences_of_systems_with_several_seeds(write, tmp_path, capsys):
    pytest.importorskip("rouge_score"), pytest.importorskip("nltk")
    report, references = tmp_path / "report.json", write("references", REFERENCES)
    files = [write("one", GOOD), write("two", BAD, ["other", "text", "here"]), write("three", WORSE)]
    arguments = ["--system", "x", files[1], files[2], "--system", "y", files[0], "--references", references, "--resamples", 50]
    output = evaluate(capsys, *arguments, "--against", "y", "--seed", 3, "--tokenize", "none", "--json", report)
    values = json.loads(report.read_text())
    scores = values["systems"]["x"]["scores"]
    *bleu, good = [sacrebleu.corpus_bleu(texts, [REFERENCES], tokenize="none").score for texts in (BAD, WORSE, GOOD)]
    assert scores["BLEU"]["seeds"] == bleu and scores["BLEU"]["mean"] == pytest.approx(np.mean(bleu))
    assert scores["BLEU"]["standard_deviation"] == pytest.approx(np.std(bleu, ddof=1))
    assert list(scores) == ["BLEU", "ROUGE-1", "ROUGE-2", "ROUGE-L", "METEOR"]
    assert values["systems"]["y"]["scores"]["METEOR"]["standard_deviation"] is None
    rows = [bleu_statistics(texts, [REFERENCES], "none") for texts in (BAD, WORSE, GOOD)]
    found = paired_bootstrap(rows[:2], rows[2:], corpus_bleu, resamples=50, seed=3)
    assert values["bootstrap"]["against"] == "y" and list(values["bootstrap"]["differences"]) == ["x"]
    differences = values["bootstrap"]["differences"]["x"]
    assert differences["BLEU"] == found._asdict() and found.difference == pytest.approx(np.mean(bleu) - good)
    rouge = scores["ROUGE-1"]["mean"] - values["systems"]["y"]["scores"]["ROUGE-1"]["mean"]
    assert differences["ROUGE-1"]["difference"] == pytest.approx(rouge)
    row = ["x", "BLEU", f"{found.difference:+.2f}", f"[{found.low:+.2f},", f"{found.high:+.2f}]", f"{found.p_value:.3f}"]
    assert row in [line.split()[:6] for line in output.splitlines()]
    assert "3 sentences against 1 reference\n" in output and "50 resamples of the sentences (seed 3)" in output
    assert "BLEU|nrefs:1|case:mixed|eff:no|tok:none|smooth:exp|version:" in output and "METEOR|nrefs:1" in output


def test_output_of_fairseq_generate_beside_plain_text(tiny, tmp_path, capsys, write):
    printed = generate(tiny, "--beam", 2)
    (tmp_path / "test.log").write_text(f"2024 | INFO | log\n{printed}finished\n")
    references = [line for _, (line,) in sorted(tagged(printed, "T").items())]
    copied = write("copy", references)
    report = tmp_path / "report.json"
    output = evaluate(
        capsys, "--system", "ours", tmp_path / "test.log", "--system", "oracle", copied, "--metrics", "bleu", "--json", report
    )
    values = json.loads(report.read_text())
    hypotheses = [lines[0].split("\t")[1] for _, lines in sorted(tagged(printed, "D").items())]
    assert values["systems"]["ours"]["scores"]["BLEU"]["mean"] == sacrebleu.corpus_bleu(hypotheses, [references]).score
    assert values["systems"]["oracle"]["scores"]["BLEU"]["mean"] == pytest.approx(100)
    assert f"{len(references)} sentences against T-lines\n" in output and "tok:13a" in output


def test_a_system_beside_itself_does_not_differ(write, capsys):
    one, two = write("one", GOOD, REFERENCES), write("two", GOOD)
    output = evaluate(capsys, "--system", "x", one, "--system", "y", two, "--metrics", "bleu", "--resamples", 20)
    assert ["y", "BLEU", "+0.00", "[+0.00,", "+0.00]", "1.000", "-"] in [line.split() for line in output.splitlines()]


def test_several_references_and_lower_case(write, tmp_path, capsys):
    others = ["A B C D X .", "nothing", "J K L"]
    files = ["--system", "s", write("s", GOOD), "--references", write("r1", REFERENCES), write("r2", others)]
    for flags, lowercase in (([], False), (["--lowercase"], True)):
        report = tmp_path / "report.json"
        output = evaluate(capsys, *files, *flags, "--metrics", "bleu", "--tokenize", "none", "--json", report)
        expected = sacrebleu.corpus_bleu(GOOD, [REFERENCES, others], tokenize="none", lowercase=lowercase).score
        assert json.loads(report.read_text())["systems"]["s"]["scores"]["BLEU"]["mean"] == expected
        assert f"BLEU|nrefs:2|case:{'lc' if lowercase else 'mixed'}|" in output and "3 sentences against 2 references" in output
    assert "bootstrap" not in json.loads(report.read_text()) and "Differences" not in output


def test_tokenised_text_is_said_to_be_and_can_be_detokenised(write, tmp_path, capsys):
    pytest.importorskip("sacremoses")
    text = ["a dog doesn &apos;t bark .", "a cat , a dog ."]
    file = write("s", text, ["a dog didn &apos;t bark .", "a cat , a dog ."])
    output = evaluate(capsys, "--system", "s", file, "--metrics", "bleu")
    assert "tok:none" in output and "Note: The references look tokenised: BLEU (tok:none) does not compare" in output
    output = evaluate(capsys, "--system", "s", file, "--metrics", "bleu", "--tokenize", "13a")
    assert "tok:13a" in output and "Note: The references look tokenised: BLEU (tok:13a)" in output
    report = tmp_path / "report.json"
    output = evaluate(capsys, "--system", "s", file, "--metrics", "bleu", "--detokenize", "en", "--json", report)
    expected = sacrebleu.corpus_bleu(["a dog doesn't bark.", "a cat, a dog."], [["a dog didn't bark.", "a cat, a dog."]])
    assert json.loads(report.read_text())["systems"]["s"]["scores"]["BLEU"]["mean"] == expected.score
    assert "tok:13a" in output and "Note" not in output
    references = write("references", ["A dog didn't bark.", "A cat, a dog."])
    output = evaluate(capsys, "--system", "s", file, "--metrics", "bleu", "--references", references)
    assert "Note: s looks tokenised and the references do not: its scores are too low." in output
    output = evaluate(capsys, "--system", "s", file, "--metrics", "bleu", "--references", references, "--detokenize", "en")
    assert "Note" not in output


def test_what_makes_scores_wrong_is_noted(write, capsys):
    pytest.importorskip("rouge_score")
    file = write("s", ["ein <unk> über alles", "ja"], ["ein <<unk>> über alles", "ja"])
    output = evaluate(capsys, "--system", "s", file, "--metrics", "rouge")
    assert "Note: 1 references hold <<unk>>, words outside the dictionary" in output
    assert "Note: 6 % of the references' letters are outside a-z: ROUGE takes them for spaces." in output
    assert "BLEU by target length" not in output


def test_latex_holds_the_tables(write, tmp_path, capsys):
    latex = tmp_path / "tables.tex"
    one, two = write("one", GOOD, REFERENCES), write("two", BAD)
    output = evaluate(capsys, "--system", "a_b", one, "--system", "c%", two, "--metrics", "bleu", "--latex", latex)
    text = latex.read_text()
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 3
    assert r"a\_b & 1 & " in text and r"c\% & BLEU & $-$" in text
    assert all(line in text for line in ("% " + line for line in output.splitlines()[-4:]))


def error(arguments):
    with pytest.raises(SystemExit) as raised:
        main([str(argument) for argument in arguments])
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_bad_flags_take_one_line(write, tmp_path, monkeypatch):
    monkeypatch.setattr("fairseq_earm.cli.evaluate.read_texts", None)  # nothing is read before
    file = tmp_path / "file"
    assert "--system a names no file" in error(["--system", "a"])
    assert "--system a is given twice" in error(["--system", "a", file, "--system", "a", "other"])
    assert "--system a names a file twice" in error(["--system", "a", file, tmp_path / "." / "file"])
    good = ["--system", "a", file, "--system", "b", "other"]
    assert "--against c is no --system: give one of a, b" in error([*good, "--against", "c"])
    for bins in (["50", "25"], ["25", "25"], ["0"], ["-5", "3"]):
        assert f"--bins {' '.join(bins)}: give lengths" in error([*good, "--bins", *bins])
    assert "--resamples 0" in error([*good, "--resamples", "0"])
    assert "--seed -1" in error([*good, "--seed", "-1"])
    for flag in ("--latex", "--json"):
        assert f"{flag} {tmp_path / 'absent' / 'file'}: there is no such folder" in error([*good, flag, tmp_path / "absent" / "file"])
    monkeypatch.setitem(sys.modules, "sacrebleu.tokenizers.tokenizer_ja_mecab", None)
    assert "--tokenize ja-mecab cannot be used: " in error([*good, "--tokenize", "ja-mecab"])


def test_bad_files_take_one_line(write, tmp_path):
    good, flags = write("good", GOOD, REFERENCES), ["--metrics", "bleu"]

    def of(*paths):
        return error(["--system", "s", *paths, *flags])

    assert "absent cannot be read: No such file" in of(tmp_path / "absent")
    assert "empty holds no sentences" in of(write("empty", []))
    assert "no file holds T-lines: give the reference translation with --references" in of(write("plain", GOOD))
    assert "short has 2 sentences and" in of(good, write("short", GOOD[:2]))
    message = of(good, write("other", BAD, [*REFERENCES[:2], "z"]))
    assert "other has other references than" in message and "first in sentence 2, 'z' for 'j k l m n o p q .'" in message
    assert "subwords: 2 of 3 sentences are in subwords, as 'a@@ b'" in of(write("subwords", ["a@@ b", "c", "d@@"], REFERENCES))
    assert "pieces: 1 of 3 sentences are in subwords, as '▁a b'" in of(write("pieces", ["▁a b", "c", "d"], REFERENCES))
    assert "(T-lines): 1 of 3 sentences are in subwords" in of(write("targets", GOOD, ["a@@ b", "c", "d"]))
    assert "1 of 3 sentences have no D-line" in of(write("cut", GOOD, REFERENCES) and _without(tmp_path / "cut", "D-1"))
    flags += ["--references", write("two", REFERENCES[:2])]
    assert "two has 2 sentences and" in of(good)
    flags[-1] = good
    assert "is what fairseq-generate printed: give plain text" in of(good)


def _without(path, start):
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if not line.startswith(start)))
    return path


def test_a_stray_mark_is_text(write, capsys):
    lines = ["a b c d"] * 99 + ["a b c d▁"]
    assert "100.00" in evaluate(capsys, "--system", "s", write("s", lines, lines), "--metrics", "bleu")


def test_files_that_cannot_be_written_or_libraries_that_are_missing(write, tmp_path, monkeypatch, capsys):
    good = ["--system", "s", write("good", GOOD, REFERENCES), "--metrics", "bleu"]
    assert f"--latex {tmp_path} cannot be written: " in error([*good, "--latex", tmp_path])
    assert f"--json {tmp_path} cannot be written: " in error([*good, "--json", tmp_path])
    monkeypatch.setitem(sys.modules, "sacremoses", None)
    assert "--detokenize en: sacremoses is not installed: pip install sacremoses" in error([*good, "--detokenize", "en"])
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    assert "--metrics rouge: rouge-score is not installed" in error([*good[:-1], "rouge"])
