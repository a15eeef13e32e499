"""The experiment on the energy's worth: its plan, a small run of it from end to end, and its statistics."""

import argparse
import json
import os
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fairseq.dataclass.utils import gen_parser_from_dataclass
from scipy import stats

from fairseq_earm.criterions.earm_checks import check_config
from fairseq_earm.criterions.earm_config import EarmCrossEntropyConfig
from fairseq_earm.ebm import objectives
from fairseq_earm.ebm.contrast import EarmSettings, Scored, contrast
from fairseq_earm.ebm.energy import TokenEnergies

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "energy_worth"
sys.path[:0] = [str(FOLDER), str(FOLDER.parent / "synthetic")]

import flipped_noise  # noqa: E402
import variance  # noqa: E402
import worth  # noqa: E402
import worth_plan  # noqa: E402
import worth_verdict  # noqa: E402


@pytest.mark.parametrize("name", worth_plan.BRANCHES)
def test_every_branch_has_flags_that_the_criterion_takes(name):
    flags = worth_plan.BRANCHES[name].flags
    assert flags[0] == "--criterion" and (FOLDER / worth_plan.BRANCHES[name].script).exists()
    parser = argparse.ArgumentParser()
    gen_parser_from_dataclass(parser, EarmCrossEntropyConfig())
    parser.add_argument("--dropout")
    parser.add_argument("--criterion")
    known = parser.parse_args(flags)
    if known.criterion == "earm_cross_entropy":
        check_config(Namespace(**vars(known), max_epoch=0, max_update=100, clip_norm=1.0))


def test_every_corpus_has_the_controls_of_its_energies():
    for name, corpus in worth_plan.CORPORA.items():
        assert set(corpus.branches) <= set(worth_plan.BRANCHES)
        assert {"likelihood", "noise", "flat 1"} <= set(corpus.branches) and not set(corpus.tuning_seeds) & set(
            corpus.fresh_seeds
        )
        if any("--earm-dropout" in worth_plan.BRANCHES[branch].flags for branch in corpus.branches):
            assert {"likelihood, off", "noise, off", "flat 1, off"} <= set(corpus.branches), name


SCRIPT = """
import sys
sys.path.insert(0, {folder!r})
from dataclasses import replace

import worth
import worth_plan

corpus = worth_plan.synthetic(60, 0.1, 2, 2, ("likelihood", "noise, none, flipped", "kl, full, off"))
worth.CORPORA["small"] = worth_plan.CORPORA["small"] = replace(
    corpus, flags=[*corpus.flags, "--log-interval", "1"], rates=(1e-3,), tuning_seeds=(1,), fresh_seeds=(3, 4),
    samples=2,
)
worth.HELD_OUT = 12
if __name__ == "__main__":  # commands are forked from a server that imports this file too
    worth.main(sys.argv[1:])
"""


def test_a_small_run_tunes_confirms_and_goes_on_where_it_was(tmp_path):
    script = tmp_path / "small.py"
    script.write_text(SCRIPT.format(folder=str(FOLDER)))

    def run(*arguments):
        command = [
            sys.executable,
            str(script),
            *arguments,
            str(tmp_path / "out"),
            "--results",
            str(tmp_path / "results"),
        ]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )

    early = run("confirm", "small")
    assert early.returncode != 0 and "not tuned yet; run worth.py tune first" in early.stderr
    tuned = run("tune", "small")
    assert tuned.returncode == 0, tuned.stderr[-3000:]
    confirmed = run("confirm", "small")
    assert confirmed.returncode == 0, confirmed.stderr[-3000:]
    files = sorted((tmp_path / "results" / "small").glob("*.json"))
    assert len(files) == 3 * 3
    rows = [json.loads(path.read_text()) for path in files]
    assert all(len(row["sentences"]["nll"]) == 12 for row in rows if row["seed"] in (3, 4))
    assert all("sentences" not in row for row in rows if row["seed"] == 1)
    for row in rows:
        if row["seed"] != 1:
            assert np.mean(row["sentences"]["nll"]) == pytest.approx(row["nll"], abs=1e-3)
            assert np.mean(row["sentences"]["joint_nll"]) == pytest.approx(row["joint_nll"], abs=1e-3)
        assert (row["training_dv"] is None) == (row["branch"] == "likelihood") and row["kl"] == pytest.approx(
            row["nll"] - row["true_nll"], abs=1e-3
        )
    stamps = {path: path.stat().st_mtime_ns for path in files}
    files[0].unlink()
    assert run("confirm" if "seed1" not in files[0].name else "tune", "small").returncode == 0
    assert files[0].exists() and all(path.stat().st_mtime_ns == stamps[path] for path in files[1:])


def rows_of(branch, seeds, values):
    return [{"branch": branch, "seed": seed, "sentences": {"nll": list(each)}} for seed, each in zip(seeds, values)]


def test_the_interval_is_over_seeds_and_sentences():
    generator = np.random.default_rng(0)
    control = generator.normal(10, 3, (5, 300))
    of_seed, of_sentence = generator.normal(0, 0.05, (5, 1)), generator.normal(0, 0.5, (1, 300))
    ours = control - 0.2 + of_seed + of_sentence + generator.normal(0, 0.1, (5, 300))
    found = worth_verdict.difference(rows_of("a", range(5), ours), rows_of("b", range(5), control), "nll")
    assert found.mean == pytest.approx((ours - control).mean())
    per_seed = stats.ttest_1samp((ours - control).mean(1), 0).confidence_interval()
    per_sentence = stats.ttest_1samp((ours - control).mean(0), 0).confidence_interval()
    assert found.half > max(
        (interval.high - interval.low) / 2 * share for interval, share in ((per_seed, 0.6), (per_sentence, 1.0))
    )
    assert found.half < sum((interval.high - interval.low) / 2 for interval in (per_seed, per_sentence))
    assert worth_verdict.difference(rows_of("a", [1], ours), rows_of("b", [1], control), "nll") is None


def test_a_p_value_is_below_a_twentieth_once_in_twenty_times_where_there_is_nothing():
    generator, below = np.random.default_rng(1), 0
    for _ in range(400):
        control = generator.normal(0, 1, (5, 60))
        ours = control + generator.normal(0, 0.1, (5, 1)) + generator.normal(0, 0.5, (1, 60))
        below += worth_verdict.difference(rows_of("a", range(5), ours), rows_of("b", range(5), control), "nll").p < 0.05
    assert 6 <= below <= 36  # 20 ± 3.7 standard deviations


def test_holm():
    assert worth_verdict.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert worth_verdict.holm([0.5, 0.9]) == [1.0, 1.0]


def test_rates_are_chosen_on_tuning_seeds_and_controls_by_validation_data():
    corpus = replace(worth_plan.CORPORA["multi30k"], tuning_seeds=(1, 2))
    rows = [
        {"branch": branch, "rate": rate, "seed": seed, "valid_joint_nll": nll + 0.1 * seed}
        for branch, rate, nll in [
            ("likelihood", 1e-3, 3.0),
            ("likelihood", 1e-4, 2.0),
            ("noise", 1e-3, 1.0),
            ("kl, full", 1e-3, 0.5),
        ]
        for seed in (1, 2)
    ]
    rows += [{"branch": "noise", "rate": 1e-4, "seed": 1, "valid_joint_nll": 0.0}]  # one of two seeds: not comparable
    rows += [{"branch": "likelihood", "rate": 1e-3, "seed": 3, "valid_joint_nll": -9.0}]  # fresh seeds choose nothing
    rows += [
        {"branch": "cross-entropy, 2.5 x updates", "rate": 1e-3, "seed": seed, "valid_joint_nll": -9.0}
        for seed in (1, 2)
    ]
    best = worth_verdict.best_rates(corpus, rows)
    assert {branch: rate for branch, (_, rate) in best.items()} == {
        "likelihood": 1e-4,
        "noise": 1e-3,
        "kl, full": 1e-3,
        "cross-entropy, 2.5 x updates": 1e-3,
    }
    assert worth_verdict.best_control(best) == "noise"


def test_the_table_of_what_is_committed_can_be_made(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["worth_verdict.py"])
    worth_verdict.main()
    printed = capsys.readouterr().out
    assert printed.count("###") == len(list((FOLDER / "results").iterdir()))


def test_noise_turned_round_keeps_the_likelihood_and_changes_the_sign_of_the_rest():
    torch.manual_seed(0)
    mask = torch.ones(2, 3, dtype=torch.bool)
    data, negatives = (Scored(TokenEnergies(torch.randn(2, 3), torch.randn(2, 3)), mask) for _ in range(2))
    found = contrast(EarmSettings(), data, negatives)
    likelihood = objectives.likelihood(found.data)
    ordinary, flipped = flipped_noise.noise(found).loss - likelihood, flipped_noise.flipped(found).loss - likelihood
    assert ordinary.item() == pytest.approx(-flipped.item()) and abs(ordinary.item()) > 0.1


def test_variances_are_taken_over_batches_and_within_them():
    generator = torch.Generator().manual_seed(0)
    batches = torch.randn(4000, 1, 2, generator=generator, dtype=torch.float64) * 3
    draws = [list(batch + torch.randn(2, 2, generator=generator, dtype=torch.float64)) for batch in batches]
    found = variance.variances(draws)
    assert found["within"] == pytest.approx(2, rel=0.05) and found["total"] == pytest.approx(2 * 10, rel=0.05)


def test_variance_measures_a_checkpoint(tiny, tmp_path, monkeypatch, capsys):
    output = tmp_path / "found.json"
    arguments = ["variance.py", tiny.data, tiny.a, output, "--batches", 3, "--max-tokens", 200]
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    variance.main()
    found = json.loads(output.read_text())
    assert len(found) == 2 * len(variance.SETTINGS) - 1
    of = {name: each["within"] for name, each in found.items()}
    assert of["likelihood | E-ARM without dropout"] == pytest.approx(0, abs=1e-12)  # neither negatives nor dropout
    assert 0 < of["kl, full | E-ARM without dropout"] < of["kl, none | E-ARM without dropout"]
    assert "| kl, full" in capsys.readouterr().out
