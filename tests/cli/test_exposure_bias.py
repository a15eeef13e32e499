"""fairseq-earm-exposure-bias on trained models, against a count word by word."""
import json
import random
from collections import Counter
from itertools import product

import pytest
import torch
from fairseq import checkpoint_utils

from fairseq_earm.cli import exposure_bias
from fairseq_earm.evaluation.translate import load_pairs, own_task
from tests.tiny_translation import generate, tagged, train

PAIRS = 30


@pytest.fixture(scope="module")
def lstm(tiny, tmp_path_factory):
    """A model of another architecture, trained by the stock task."""
    arch = ["--arch", "lstm", "--encoder-embed-dim", 16, "--decoder-embed-dim", 16, "--decoder-out-embed-dim", 16]
    return train(tiny, tmp_path_factory.mktemp("lstm"), "--max-epoch", 1, arch=arch).folder / "checkpoint_last.pt"


def run(tiny, a, b, *arguments):
    flags = ("--path", a, "--against", b, "--cpu", "--pairs", PAIRS, *arguments)
    exposure_bias.main([str(argument) for argument in (tiny.data, *flags)])


def measure(tiny, a, b, path, *arguments):
    run(tiny, a, b, "--json", path, *arguments)
    return json.loads(path.read_text())


def log_prob_and_rank(model, source, context, word):
    read = torch.tensor([[model.decoder.dictionary.eos(), *context]])
    with torch.no_grad():
        log_probs = model(source.unsqueeze(0), torch.tensor([len(source)]), read)[0][0, -1].log_softmax(-1)
    return log_probs[word].item(), (log_probs > log_probs[word]).sum().item()


def test_the_count_is_that_of_single_words(tiny, tmp_path, capsys):
    """Translations as fairseq-generate prints them, then one forward of the whole model for each word and context."""
    report = measure(tiny, tiny.a, tiny.b, tmp_path / "out.json", "--gen-subset", "valid", "--beam", 2, "--batch-size", 7)
    dataset = load_pairs(own_task(str(tiny.a), str(tiny.data), flag="--path"), str(tiny.data), "valid")
    models = [checkpoint_utils.load_model_ensemble([str(path)])[0][0].eval() for path in (tiny.a, tiny.b)]
    index_of = models[0].decoder.dictionary.index
    printed = [tagged(generate(tiny, "--beam", 2, "--max-len-b", 200, models=name, subset="valid"), "H") for name in "ab"]
    wins, words, references = Counter(), 0, 0
    for number in random.Random(1).sample(range(60), PAIRS):
        source, target = dataset[number]["source"], dataset[number]["target"][:-1].tolist()
        own = [[index_of(word) for word in lines[number][0].split("\t")[1].split()] for lines in printed]
        references += len(target)
        for step, word in enumerate(target[: min(map(len, own)) + 1]):
            words += 1
            for context, given in (("own", own), ("reference", [target, target])):
                a, b = (log_prob_and_rank(model, source, read[:step], word) for model, read in zip(models, given))
                wins["probability", context, "greater"] += a[0] > b[0]
                wins["rank", context, "greater"] += a[1] < b[1]
                wins["rank", context, "ties"] += a[1] == b[1]
    assert report["words"] == words and report["not_reached"] == references - words > 0
    printed = capsys.readouterr().out
    for (name, context, count), times in wins.items():
        row = report[name][context]
        assert row[count] == times and row["ratio"] == pytest.approx(row["greater"] / (words - row["ties"]))
        assert f"{row['ratio']:.4f}" in printed and f"{report[name]['difference']['ratio']:+.4f}" in printed
    assert report["probability"]["own"]["ties"] == 0 and len(set(wins.values())) > 4
    assert f"{PAIRS} pairs of valid; {references} reference words" in printed and f"reach {words}, which count" in printed


def test_models_exchanged_and_of_another_architecture(tiny, lstm, tmp_path):
    one = measure(tiny, tiny.a, lstm, tmp_path / "one.json")
    other = measure(tiny, lstm, tiny.a, tmp_path / "other.json")
    for name, context in product(("probability", "rank"), ("own", "reference")):
        assert one[name][context]["ratio"] == pytest.approx(1 - other[name][context]["ratio"])
        assert one[name][context]["greater"] == other[name][context]["less"] > 0
    assert one["settings"]["a"] == other["settings"]["b"] == str(tiny.a) and one["settings"]["pairs"] == PAIRS


def test_a_model_against_itself(tiny, tmp_path, capsys):
    report = measure(tiny, tiny.a, tiny.a, tmp_path / "out.json")
    for name, context in product(("probability", "rank"), ("own", "reference")):
        row = report[name][context]
        assert row == {"greater": 0, "less": 0, "ties": report["words"], "ratio": None, "interval": None}
    assert capsys.readouterr().out.count("        -\n") == 6


def test_other_seeds_draw_other_pairs(tiny, tmp_path):
    reports = [measure(tiny, tiny.a, tiny.b, tmp_path / f"{i}.json", "--seed", seed) for i, seed in enumerate((1, 1, 2))]
    assert reports[0] == reports[1]
    assert reports[0]["settings"]["text_sha256"] != reports[2]["settings"]["text_sha256"]


def test_a_killed_run_goes_on(tiny, tmp_path, monkeypatch, caplog):
    whole = measure(tiny, tiny.a, tiny.b, tmp_path / "whole.json", "--batch-size", 8)
    measured, killed = [], exposure_bias.measure_pairs

    def until_killed(translators, indices, **settings):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(indices)
        return killed(translators, indices, **settings)

    monkeypatch.setattr(exposure_bias, "measure_pairs", until_killed)
    path = tmp_path / "out.json"
    with pytest.raises(KeyboardInterrupt):
        measure(tiny, tiny.a, tiny.b, path, "--batch-size", 8)
    partial = tmp_path / "out.json.partial"
    lines = partial.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 2 * 8 and not path.exists()
    partial.write_text("".join(lines[:-3]))  # killed in the middle of a batch
    with pytest.raises(SystemExit, match="another beam"):
        measure(tiny, tiny.a, tiny.b, path, "--batch-size", 8, "--beam", 2)
    measured.clear()
    monkeypatch.setattr(exposure_bias, "measure_pairs", lambda *a, **k: (measured.append(a[1]), killed(*a, **k))[1])
    caplog.set_level("INFO")
    assert measure(tiny, tiny.a, tiny.b, path, "--batch-size", 8) == whole
    assert len(measured) == 3 and "13 of 30 pairs were measured before" in caplog.text and not partial.exists()


def test_fewer_pairs_than_asked_for(tiny, caplog, capsys):
    run(tiny, tiny.a, tiny.b, "--gen-subset", "test")
    assert "--pairs 30: test has 7" in caplog.text and "7 pairs of test;" in capsys.readouterr().out


def test_a_plot(tiny, tmp_path):
    pytest.importorskip("matplotlib")
    run(tiny, tiny.a, tiny.b, "--plot", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_mistakes_get_one_line(tiny, text, tmp_path):
    for arguments, message in (
        (["--pairs", 0], "--pairs 0: give 1 or more"),
        (["--beam", 0], "--beam 0"),
        (["--batch-size", -1], "--batch-size -1"),
        (["--json", tmp_path / "none" / "out.json"], "--json .*: there is no such folder"),
        (["--plot", tmp_path / "none" / "out.png"], "--plot .*: there is no such folder"),
        (["--plot", tmp_path / "out.xyz"], "--plot .*out.xyz: the figure is a PNG file"),
        (["--seed", -1], "--seed -1: give 0 or more"),
        (["--gen-subset", "none"], "--gen-subset none"),
        (["--against", text.base], "--against .*: not a checkpoint"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(tiny, tiny.a, tiny.b, *arguments)
