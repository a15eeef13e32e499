"""What the commands write with --json is recognised and laid out, and nothing else is."""
import json

import pytest

from fairseq_earm.cli import evaluate, tune
from fairseq_earm.cli.result_tables import result_tables
from fairseq_earm.evaluation import exposure_bias, residual
from tests.cli import test_tune
from tests.evaluation.test_exposure_bias import pairs


def is_even(table):
    return all(len(row) == len(table.header) for row in table.rows)


def test_perplexity_between_bounds():
    records = [
        {"index": i, "base": [-1.0, -2.0], "energy": 0.5 * i, "log_z": [[0.0, 0.4], [0.1, 0.2]], "steps": [[-1.5, -0.5], [-2.0, -2.0]]}
        for i in range(2)
    ]
    report = {"conditions": "Such text.", **residual.summarize(records, [10, 100], per_step=True)}
    bounds, steps = result_tables(report)
    assert is_even(bounds) and is_even(steps) and "2 sequences, 4 tokens. Such text." in bounds.title
    assert bounds.rows[0] == ["base", "", "4.48", "4.48", ""]
    row = report["joint"][1]
    assert bounds.rows[2][:3] == ["joint", "100", f"{row['perplexity_lower']:.2f}"]
    assert bounds.rows[2][4].startswith(f"{row['gain']:+.4f} ± ")
    assert [row[0] for row in steps.rows] == ["1", "2"]
    [alone] = result_tables({"conditions": "", **residual.summarize([{"index": 0, "base": [-1.0]}])})
    assert alone.rows == [["base", "2.72"]]


def test_tuned_weights(tmp_path):
    path = tmp_path / "tuned.json"
    tune.main([test_tune.write(tmp_path, test_tune.LOG + test_tune.SMALL), "--energy-weight", "1", "--json", str(path)])
    [table] = result_tables(json.loads(path.read_text()))
    assert is_even(table) and [row[0] for row in table.rows] == ["0", "1"] and table.rows[1][2] == "100.00"


def test_exposure_bias():
    report = exposure_bias.summarize(pairs([[1, 1, 0], [0.5]]))
    [table] = result_tables({**report, "settings": {"a": "one.pt", "b": "two.pt"}})
    assert is_even(table) and len(table.rows) == 6 and "A: one.pt. B: two.pt." in table.title
    assert table.rows[0][1:5] == ["2", "1", "1", "0.6667"]
    assert [table.rows[i][4] for i in (1, 2)] == ["0.0000", "+0.6667"]
    [tied] = result_tables(exposure_bias.summarize(pairs([[0.5], [0.5]])))
    assert [row[4:] for row in tied.rows if "own" in row[0] or "difference" in row[0]] == [["-", "-"]] * 4


def test_scores_of_systems(tmp_path):
    path, texts = tmp_path / "scores.json", [tmp_path / name for name in ("a", "b", "references")]
    for text in texts:
        text.write_text("one two three four five\nsix seven eight nine ten\n")
    systems = [word for text in texts[:2] for word in ("--system", text.name, text)]
    arguments = [*systems, "--references", texts[2], "--metrics", "bleu", "--tokenize", "none", "--json", path]
    evaluate.main([str(argument) for argument in arguments])
    tables = result_tables(json.loads(path.read_text()))
    assert len(tables) == 3 and all(map(is_even, tables)) and tables[0].rows[0] == ["a", "1", "100.00"]


@pytest.mark.parametrize("report", [
    {}, [], 3, None, {"nll": 1.0}, {"conditions": 1, "base": 2, "tokens": 3, "sequences": 4},
    {"best": 1, "settings": 2, "sacrebleu_tokenize": 3},
])
def test_other_json_is_not_taken_for_it(report):
    assert result_tables(report) is None
