import json

import numpy as np
import pytest
import sacrebleu

from fairseq_earm.cli.nbest import read_nbest
from fairseq_earm.cli.tune import SentenceStatistics, corpus_bleu, main, select, tune
from fairseq_earm.evaluation import significance
from tests.tiny_translation import generate, tagged

LIST = ["--beam", 5, "--nbest", 5, "--energy-rerank"]
GENERATED = ["--generated-energy-weight", "1", "--generated-lenpen", "1"]
LOG = 'INFO | energy reranking: {"energy_weight": 1.0, "lenpen": 1.0, "select": "best", "energy_step": "last"}\n'

# Two sentences, two candidates each, log q and log μ in bits: scores are (log q + log μ) / length.
SMALL = """\
S-1	x y
T-1	a b c d e
H-1	-0.5	a b c d
D-1	-0.5	a b c d
P-1	-1.0000 -1.0000 -1.0000 -1.0000 -0.5000
H-1	-0.25	a b c d e
D-1	-0.25	a b c d e
P-1	-2.0000 -1.0000 -1.0000 -1.0000 -1.0000 -2.0000
S-0	z
T-0	f g h i
H-0	0.0	f g h i
D-0	0.0	f g h i
P-0	-1.0000 -1.0000 -1.0000 -1.0000 -1.0000
H-0	-inf	i
D-0	-inf	i
P-0	-0.1000 -0.1000
"""


def write(folder, text, name="list.txt"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def printed(tiny):
    return generate(tiny, *LIST, subset="valid")


@pytest.fixture(scope="module")
def nbest(tiny, printed):
    return read_nbest([write(tiny.folder, printed, "valid.list")], weight=1.0, lenpen=1.0)


def test_small_list_is_read_exactly(tmp_path):
    nbest = read_nbest([write(tmp_path, SMALL), write(tmp_path, LOG, "log")])
    assert nbest.references == ["a b c d e", "f g h i"]
    assert nbest.texts == [["a b c d", "a b c d e"], ["f g h i", "i"]]
    bits = np.log(2)
    np.testing.assert_allclose(nbest.log_q, np.array([[-4.5, -8.0], [-5.0, -0.2]]) * bits)
    np.testing.assert_allclose(nbest.log_mu, np.array([[2.0, 6.5], [5.0, -np.inf]]) * bits)
    assert nbest.lengths.tolist() == [[5, 6], [5, 2]]


def test_selection_is_by_the_formula_and_never_by_missing_energies(tmp_path):
    nbest = read_nbest([write(tmp_path, LOG + SMALL)])
    assert select(nbest, 0.0, 1.0).tolist() == [0, 1]  # -4.5/5 against -8/6, -5/5 against -0.2/2
    assert select(nbest, 0.0, 5.0).tolist() == [1, 0]
    assert select(nbest, 0.1, 1.0).tolist() == [0, 0]  # the last candidate's energy is not finite
    assert select(nbest, 1.0, 1.0).tolist() == [1, 0]


def test_missing_candidates_and_impossible_ones_are_never_chosen(tmp_path):
    short = SMALL.replace("D-0\t-inf\ti\n", "").replace("P-0\t-0.1000 -0.1000\n", "")
    nbest = read_nbest([write(tmp_path, LOG + short)])
    assert all(select(nbest, weight, lenpen)[1] == 0 for weight in (0.0, 1.0) for lenpen in (0.0, 1.0, 3.0))
    impossible = SMALL.replace("P-0\t-0.1000 -0.1000", "P-0\t-0.1000 -inf")
    assert select(read_nbest([write(tmp_path, LOG + impossible)]), 1.0, 1.0).tolist() == [1, 0]


@pytest.mark.parametrize("weight, lenpen", [(0.0, 1.0), (0.5, 0.4), (20.0, 1.6)])
def test_selection_is_what_generation_chooses(tiny, nbest, weight, lenpen):
    flags = ["--energy-weight", weight, "--lenpen", lenpen, "--beam", 5, "--energy-rerank"]
    generated = tagged(generate(tiny, *flags, subset="valid"), "D")
    chosen = [texts[index] for texts, index in zip(nbest.texts, select(nbest, weight, lenpen))]
    different = [a for a, (line,) in zip(chosen, generated.values()) if a != line.split("\t")[1]]
    assert len(chosen) == 60 and len(different) <= 1  # P-lines are rounded, so a near tie may fall the other way


def test_recovered_energies_do_not_depend_on_how_the_list_was_generated(tiny, nbest, tmp_path):
    other = generate(tiny, "--beam", 5, "--nbest", 5, "--energy-rerank", "--energy-weight", 3, "--unnormalized", subset="valid")
    again = read_nbest([write(tmp_path, other)], weight=3.0, lenpen=0.0)
    for left, right, rows in zip(nbest.texts, again.texts, zip(nbest.log_mu, again.log_mu)):
        assert sorted(left) == sorted(right)
        assert sorted(rows[0]) == pytest.approx(sorted(rows[1]), abs=2e-3)


@pytest.mark.parametrize("tokenizer", ["13a", "none", "char"])
def test_corpus_bleu_from_statistics_is_sacrebleus(nbest, tokenizer):
    rng = np.random.default_rng(0)
    statistics = SentenceStatistics(nbest, tokenizer)
    for _ in range(5):
        choice = np.array([rng.integers(len(texts)) for texts in nbest.texts])
        sentences = rng.integers(60, size=60)
        texts = [nbest.texts[i][choice[i]] for i in sentences]
        references = [nbest.references[i] for i in sentences]
        expected = sacrebleu.corpus_bleu(texts, [references], tokenize=tokenizer).score
        assert corpus_bleu(statistics(choice)[sentences].sum(0)) == expected


def test_table_holds_the_best_length_penalty_of_every_weight(nbest):
    weights, lenpens = (0.5, 2.0), (0.4, 1.6)
    settings = tune(nbest, weights, lenpens, resamples=50)
    assert [row.energy_weight for row in settings] == [0.0, 0.5, 2.0]
    for row in settings:
        scores = {}
        for lenpen in lenpens:
            texts = [texts[i] for texts, i in zip(nbest.texts, select(nbest, row.energy_weight, lenpen))]
            scores[lenpen] = sacrebleu.corpus_bleu(texts, [nbest.references]).score
        assert (row.lenpen, row.bleu) == max(scores.items(), key=lambda item: item[1])
        assert row.gain == row.bleu - settings[0].bleu
    assert settings[0].gain_interval == (0.0, 0.0)


def test_bootstrap_is_paired_and_as_sacrebleu_scores_it(nbest):
    settings = tune(nbest, [5.0], [1.0], resamples=40, seed=3)
    draws = np.random.default_rng(3).multinomial(60, np.full(60, 1 / 60), size=40)
    scores = {}
    for weight in (0.0, 5.0):
        texts = [texts[i] for texts, i in zip(nbest.texts, select(nbest, weight, 1.0))]
        scores[weight] = []
        for draw in draws:
            rows = np.repeat(np.arange(60), draw)
            chosen, references = [texts[i] for i in rows], [nbest.references[i] for i in rows]
            scores[weight].append(sacrebleu.corpus_bleu(chosen, [references]).score)
    gains = np.array(scores[5.0]) - np.array(scores[0.0])
    assert settings[1].interval == pytest.approx(tuple(np.percentile(scores[5.0], [2.5, 97.5])), abs=1e-9)
    assert settings[1].gain_interval == pytest.approx(tuple(np.percentile(gains, [2.5, 97.5])), abs=1e-9)


def test_command_prints_the_flags_and_writes_json(tmp_path, capsys):
    report = tmp_path / "report.json"
    arguments = [write(tmp_path, LOG + SMALL), "--energy-weight", "1", "--lenpen", "1", "1.1", "--json", str(report)]
    main(arguments)
    output = capsys.readouterr().out
    assert output.splitlines()[0].split()[:3] == ["weight", "lenpen", "BLEU"]
    assert output.endswith("Best of 2 sentences (sacreBLEU, tok:13a): --energy-weight 1 --lenpen 1\n")
    values = json.loads(report.read_text())
    assert values["best"]["energy_weight"] == 1 and values["best"]["bleu"] == pytest.approx(100)
    assert len(values["settings"]) == 2 and values["sentences"] == 2 and values["seed"] == 1
    main(arguments)
    assert capsys.readouterr().out == output and json.loads(report.read_text()) == values
    main([*arguments, "--seed", "2", "--resamples", "3", "--sacrebleu-tokenize", "none"])
    assert json.loads(report.read_text())["settings"] != values["settings"]


def error(arguments):
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_input_errors_take_one_line(tmp_path):
    def of(text, *arguments):
        return error([write(tmp_path, text), *arguments])

    assert "No such file" in error([str(tmp_path / "absent"), *GENERATED])
    (tmp_path / "latin").write_bytes(b"T-0\t\xe9\n")
    assert "not UTF-8" in error([str(tmp_path / "latin")])
    assert "no hypotheses (H-, D- and P-lines)" in of("T-0\ta\n")
    assert "no references (T-lines)" in of("\n".join(line for line in SMALL.splitlines() if line[0] != "T"))
    assert "1 sentences with T-lines, 2 with hypotheses" in of(SMALL.replace("T-0\tf g h i\n", ""))
    assert "lack their P-lines" in of(SMALL.replace("P-0\t-0.1000 -0.1000\n", ""))
    assert "two T-lines" in of(SMALL + SMALL)
    assert "a line without its numbers, 'P-0" in of(SMALL.replace("-0.1000 -0.1000", "-0.1 INFO"))
    single = SMALL.replace("D-1\t-0.25\ta b c d e\n", "").replace("D-0\t-inf\ti\n", "")
    single = single.replace("P-1\t-2.0000 -1.0000 -1.0000 -1.0000 -1.0000 -2.0000\n", "").replace("P-0\t-0.1000 -0.1000\n", "")
    assert "one hypothesis per sentence" in of(single)


def test_generation_settings_are_asked_for_and_compared(tmp_path):
    def of(text, *arguments):
        return error([write(tmp_path, text), *arguments])

    assert "or --generated-energy-weight" in of(SMALL)
    assert "or --generated-lenpen" in of(SMALL, "--generated-energy-weight", "1")
    assert "--generated-lenpen 0.5, but the log says 1: leave the flag out" in of(LOG + SMALL, "--generated-lenpen", "0.5")
    assert "--energy-weight 0:" in of(SMALL, "--generated-energy-weight", "0", "--generated-lenpen", "1")
    assert "--energy-weight 0.001:" in of(SMALL, "--generated-energy-weight", "0.001", "--generated-lenpen", "1")


def test_scores_without_energy_are_refused(tiny, tmp_path):
    stock = generate(tiny, "--beam", 5, "--nbest", 5, subset="valid")
    assert "hold no energy" in error([write(tmp_path, stock), *GENERATED])


def test_bad_arguments(tmp_path, capsys):
    path = write(tmp_path, LOG + SMALL)
    assert "--resamples 0" in error([path, "--resamples", "0"])
    assert "--seed -1: give 0 or more" in error([path, "--seed", "-1"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fairseq_earm.cli.tune.read_nbest", None)
        assert "there is no such folder" in error([path, "--json", str(tmp_path / "absent" / "report.json")])
    assert "cannot be written" in error([path, "--lenpen", "1", "--json", str(tmp_path)])
    for flag, value in (("--energy-weight", "-1"), ("--energy-weight", "nan"), ("--lenpen", "inf"), ("--sacrebleu-tokenize", "x")):
        with pytest.raises(SystemExit) as raised:
            main([path, f"{flag}={value}"])
        assert raised.value.code == 2 and flag in capsys.readouterr().err


def test_memory_for_the_resamples_does_not_change_a_digit(nbest, monkeypatch):
    whole = tune(nbest, [1.0, 5.0], [1.0], resamples=20)
    blocks = []

    def drawn(*settings):
        for block in significance.draw_multinomial(*settings):
            blocks.append(len(block))
            yield block

    monkeypatch.setattr(significance, "DRAWN_AT_ONCE", 3 * len(nbest.texts))
    monkeypatch.setattr("fairseq_earm.cli.tune.draw_multinomial", drawn)
    assert tune(nbest, [1.0, 5.0], [1.0], resamples=20) == whole
    assert blocks == [3] * 6 + [2]
