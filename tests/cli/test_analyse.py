"""fairseq-earm-analyse: its report against recomputed figures, and pairs from page to test."""
import json
import math
import os

import pytest
import torch
from fairseq import checkpoint_utils

pytest.importorskip("matplotlib")

from fairseq_earm.cli import analyse, perplexity  # noqa: E402
from fairseq_earm.evaluation.joint_models import LanguageJoint  # noqa: E402
from fairseq_earm.sampling.blocks import load_blocks  # noqa: E402
from fairseq_earm.sampling.continuation import score_continuations  # noqa: E402
from tests.tiny_energy import LENGTH, PREFIX  # noqa: E402

FIGURES = ["estimates_by_samples.png", "gain_by_position.png", "log_probabilities.png", "unique_ngrams.png"]
TEXTS = ["base.txt", "data.txt", "joint.txt", "prefixes.txt"]


def run(*arguments):
    analyse.main([str(argument) for argument in arguments])


def report(text, energy, folder, *arguments, base=None, data=None):
    few = ["--max-sequences", 6, "--energy-candidates", 40, "--perplexity-sequences", 2, "--samples", 5, 10]
    run("report", data or text.data, "--path", base or text.base, "--energy-path", energy, "--output", folder, "--cpu", *few, *arguments)
    return json.loads((folder / "report.json").read_text())


def load(path):
    return checkpoint_utils.load_model_ensemble([str(path)])[0][0].eval()


def test_the_report_is_about_the_texts_it_writes(text, energy, tmp_path, capsys):
    found = report(text, energy, tmp_path)
    printed = capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == sorted([*FIGURES, *TEXTS, "report.json"])
    base, network = load(text.base), load(energy)
    dictionary = base.decoder.dictionary
    blocks = load_blocks(f"{text.data}/test", dictionary, sequence_length=LENGTH)
    indices = [i * 19 // 6 for i in range(6)]
    assert (tmp_path / "data.txt").read_text() == "".join(dictionary.string(blocks[i][PREFIX:]) + "\n" for i in indices)
    assert (tmp_path / "prefixes.txt").read_text() == "".join(dictionary.string(blocks[i][:PREFIX]) + "\n" for i in indices)
    rows = torch.stack([blocks[i] for i in indices])
    log_p = score_continuations(base, rows, PREFIX, pad=dictionary.pad(), eos=dictionary.eos()).sum(1)
    with torch.no_grad():
        neg_energies = -network(rows)
    for name in ("base", "joint"):
        figures = found["log_probabilities"][name]
        for source in ("base", "joint"):
            gaps = [one - other for one, other in zip(figures[source]["values"], figures["data"]["values"])]
            assert figures[source]["minus_data"] == pytest.approx(sum(gaps) / 6)
            assert f"{figures[source]['mean']:.2f} ({figures[source]['minus_data']:+.2f}" in printed
    data = {model: found["log_probabilities"][model]["data"]["values"] for model in ("base", "joint")}
    assert data["base"] == pytest.approx(log_p.tolist(), abs=1e-4)
    log_z = [p + e - joint for p, e, joint in zip(log_p.tolist(), neg_energies.tolist(), data["joint"])]
    assert found["log_z"]["lower"] == pytest.approx(sum(log_z) / 6, abs=1e-4)
    assert found["log_z"]["upper"] > found["log_z"]["lower"]
    assert 1 < found["effective_sample_size"]["least"] < found["effective_sample_size"]["mean"] < 40
    assert [row["samples"] for row in found["perplexity"]["joint"]] == [5, 10]
    assert [row["step"] for row in found["perplexity"]["steps"]] == [1, 2, 3, 4]


def test_sentences_that_lose_their_end_are_counted(text, energy, tmp_path, capsys):
    lengths = ["--sample-break-mode", "eos", "--prefix-length", 2, "--sequence-length", 4]
    found = report(text, energy, tmp_path, *lengths)
    assert 0 < found["cut"] <= 6
    assert f"6 prefixes; {found['cut']} longer sentences lost their end; joint samples" in capsys.readouterr().out


def test_joint_samples_have_lower_energies_than_base_samples(text, energy, tmp_path):
    found = report(text, energy, tmp_path, "--gen-subset", "train", "--max-sequences", 60)
    log_probs = found["log_probabilities"]
    gains = {
        source: sum(log_probs["joint"][source]["values"]) / 60 - sum(log_probs["base"][source]["values"]) / 60
        for source in ("base", "joint")
    }
    assert gains["joint"] > gains["base"] + 0.5


def test_an_energy_of_the_data_that_is_no_number_ends_the_report(text, energy, tmp_path, monkeypatch):
    monkeypatch.setattr(LanguageJoint, "energy", lambda self, item: torch.tensor(math.nan))
    with pytest.raises(SystemExit, match="1 of 1 energies are not finite"):
        report(text, energy, tmp_path)


def test_the_report_follows_the_seed_alone(text, energy, tmp_path):
    one, other = (report(text, energy, tmp_path / name) for name in "ab")
    assert one == other
    assert (tmp_path / "a" / "joint.txt").read_text() == (tmp_path / "b" / "joint.txt").read_text()
    third = report(text, energy, tmp_path / "c", "--seed", 2)
    assert third["unique_ngrams"] != one["unique_ngrams"] or third["log_z"] != one["log_z"]


def test_perplexities_measured_before_are_taken_over(text, energy, tmp_path):
    path = tmp_path / "perplexity.json"
    measured = ["--energy-path", energy, "--samples", 4, 8, "--max-sequences", 2, "--json", path, "--cpu"]
    perplexity.main([str(a) for a in (text.data, "--path", text.base, *measured)])
    found = report(text, energy, tmp_path / "out", "--perplexity", path)
    assert found["perplexity"]["joint"] == json.loads(path.read_text())["joint"]
    assert not (tmp_path / "out" / "gain_by_position.png").exists(), "it was measured without --per-step"
    assert (tmp_path / "out" / "estimates_by_samples.png").exists()
    figures = json.loads(path.read_text())
    for name, flag in (("base", "--path"), ("energy", "--energy-path")):
        path.write_text(json.dumps({**figures, "settings": {**figures["settings"], name: "0" * 64}}))
        with pytest.raises(SystemExit, match=f"--perplexity .* was measured with another checkpoint than {flag}"):
            report(text, energy, tmp_path / "out", "--perplexity", path)
    path.write_text(json.dumps(figures))
    with pytest.raises(SystemExit, match="--perplexity .* was measured on other sequences than these, of --gen-subset valid"):
        report(text, energy, tmp_path / "out", "--perplexity", path, "--gen-subset", "valid")


def test_bad_settings_of_the_report(text, energy, tmp_path):
    (tmp_path / "file").write_text("{}")
    for arguments, paths, message in (
        (["--energy-candidates", 1], {}, "--energy-candidates 1: give 2 or more"),
        (["--max-sequences", 0], {}, "--max-sequences 0: give 1 or more"),
        (["--samples", 1], {}, "--samples 1"),
        (["--post-process", "none such"], {}, "^2$"),
        (["--perplexity", tmp_path / "missing"], {}, "--perplexity .* cannot be read"),
        (["--perplexity", tmp_path / "file"], {}, "--perplexity .* is not what fairseq-earm-perplexity"),
        (["--output", tmp_path / "file"], {}, "--output .* cannot be made"),
        ([], {"data": tmp_path}, "has no dict.txt"),
        ([], {"data": f"{text.data}:{text.data}"}, "names 2 folders, and this command reads one"),
        ([], {"base": energy}, "--path .* is a BidirectionalEnergyTransformer"),
    ):
        with pytest.raises(SystemExit, match=message):
            report(text, energy, tmp_path / "out", *arguments, **paths)
    assert not (tmp_path / "out" / "report.json").exists()


def write(path, lines):
    path.write_text("".join(line + "\n" for line in lines))
    return path


def test_from_page_to_test(tmp_path, capsys):
    """A rater who always prefers A and passes the checks, and one who always answers left."""
    a = write(tmp_path / "a.txt", [f"alpha <b> writes {i} words" for i in range(12)])
    b = write(tmp_path / "b.txt", [f"beta wrote {i} other words" for i in range(12)])
    page = tmp_path / "page.html"
    run("ab-export", a, b, "--prefixes", a, "--items", 7, "--checks", 4, "--output", page)
    assert "7 pairs and 4 attention checks" in capsys.readouterr().out
    key = json.loads((tmp_path / "page.key.json").read_text())
    assert key["systems"] == {"A": str(a), "B": str(b)} and key["page"] in page.read_text()
    assert str(a) not in page.read_text() and "&lt;b&gt; writes" in page.read_text()
    fair = {str(item["item"]): "left" if item["left"] in ("A", "real") else "right" for item in key["items"]}
    raters = {"fair": fair, "lazy": dict.fromkeys(fair, "left")}
    for name, answers in raters.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"page": key["page"], "rater": name, "answers": answers}))
    paths = [tmp_path / "fair.json", tmp_path / "lazy.json", tmp_path / "page.key.json"]
    run("ab-test", *paths, "--json", tmp_path / "result.json")
    printed = capsys.readouterr().out
    assert f"A {a}: 7 of 7 votes (100.0%), one-sided p = 0.007812" in printed
    assert f"B {b}: 0 of 7 votes (0.0%), one-sided p = 1" in printed
    assert "1 raters; left out for failed attention checks: lazy; 0 pairs left open" in printed
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["wins_a"] == 7 and result["p_value"] == pytest.approx(1 / 128)
    with pytest.raises(SystemExit, match="given twice"):
        run("ab-test", paths[0], paths[0], paths[2])
    with pytest.raises(SystemExit, match="is no key of ab-export"):
        run("ab-test", paths[2], paths[0])
    with pytest.raises(SystemExit, match="--allowed-failures -1: give 0 or more"):
        run("ab-test", *paths, "--allowed-failures", -1)


def test_bad_files_of_pairs(tmp_path):
    a = write(tmp_path / "a.txt", ["one two three four"] * 3)
    with pytest.raises(SystemExit, match="missing.txt cannot be read: No such file"):
        run("ab-export", a, tmp_path / "missing.txt", "--output", tmp_path / "page.html")
    with pytest.raises(SystemExit, match="--items 100: only 0 lines differ"):
        run("ab-export", a, a, "--output", tmp_path / "page.html")
    with pytest.raises(SystemExit, match="--items 0 --checks 10"):
        run("ab-export", a, a, "--items", 0, "--output", tmp_path / "page.html")
    with pytest.raises(SystemExit, match="a.txt is not JSON"):
        run("ab-test", a, a)
    b = write(tmp_path / "b.txt", ["two"] * 3)
    with pytest.raises(SystemExit, match="page.html: there is no such folder"):
        run("ab-export", a, b, "--items", 1, "--checks", 1, "--output", tmp_path / "none" / "page.html")
    with pytest.raises(SystemExit, match="--output /dev/stdout: the page's key is written beside it"):
        run("ab-export", a, b, "--items", 1, "--checks", 1, "--output", "/dev/stdout")
