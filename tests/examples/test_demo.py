"""The demonstration from end to end, in its quick size, from a folder and into a folder with spaces."""
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "synthetic"
sys.path.insert(0, str(EXAMPLE))
import demo  # noqa: E402
import language  # noqa: E402
import report  # noqa: E402
import settings  # noqa: E402
import verdict  # noqa: E402


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder and printed text of one quick run."""
    folder = tmp_path_factory.mktemp("with a space")
    command = [sys.executable, str(EXAMPLE / "demo.py"), "--quick", "--output", "the output"]
    done = subprocess.run(command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "the output", done.stdout


def results_of(output):
    return json.loads((output / "results.json").read_text())["results"]


def test_all_models_and_figures_are_there(run):
    output, text = run
    assert set(results_of(output)) == {"base", *settings.QUICK.branches}
    for name in ("training", "training-base", "energies", "weights"):
        assert (output / f"{name}.png").stat().st_size > 10_000
    assert text.count("$ fairseq-train") == 1 + len(settings.QUICK.branches)
    assert (output / "report.txt").read_text().strip() in text


def test_numbers_agree_with_each_other_and_with_the_language(run):
    output, _ = run
    pairs = language.sample_pairs(settings.QUICK.test, seed=3)
    true_nll = -statistics.mean(language.log_probability(*pair) for pair in pairs)
    entropy = statistics.mean(language.entropy(source) for source, _ in pairs)
    for numbers in results_of(output).values():
        assert numbers["true_nll"][0] == pytest.approx(true_nll, abs=1e-6)
        assert numbers["entropy"][0] == pytest.approx(entropy, abs=1e-6)
        assert numbers["kl"][0] == pytest.approx(numbers["nll"][0] - true_nll, abs=1e-4)
        assert numbers["joint_gain"][0] == pytest.approx(numbers["nll"][0] - numbers["joint_nll"][0], abs=1e-6)
        assert 0 <= numbers["in_language"][0] <= 1


def test_nll_is_what_fairseq_validates(run):
    output, _ = run
    from fairseq_earm.evaluation.training_log import read_log

    folder = output / "runs" / "seed1" / "earm"
    tokens = sum(len(t) + 1 for _, t in language.sample_pairs(settings.QUICK.valid, seed=2))
    bits_per_token = read_log(folder / "train.log")["valid"][-1]["nll_loss"]
    per_sentence = bits_per_token * math.log(2) * tokens / settings.QUICK.valid
    # The log has three digits after the point.
    assert results_of(output)["earm"]["valid_nll"][0] == pytest.approx(per_sentence, abs=0.01)


def test_printed_table_holds_the_numbers(run):
    output, text = run
    row = next(line for line in text.splitlines() if line.startswith("test NLL of q"))
    assert row.split()[4:] == [f"{numbers['nll'][0]:.3f}" for numbers in results_of(output).values()]


def test_failing_command_stops_the_demonstration_with_its_output(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "preprocess_command", lambda raw, binary: ["fairseq-preprocess", "--no-such-flag"])
    assert demo.main(["--quick", "--output", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr()
    assert "failed with exit status 2" in printed.err and "unrecognized arguments: --no-such-flag" in printed.err
    assert "fairseq-train" not in printed.out


def test_folder_of_someone_else_is_left_alone(tmp_path):
    (tmp_path / "runs").mkdir()
    with pytest.raises(SystemExit):
        demo.main(["--quick", "--output", str(tmp_path)])
    assert (tmp_path / "runs").exists()


def fake_results(earm, control, dv=0.1):
    """Results of three seeds in which every metric of a model has the same values."""
    keys = {metric.key for metric in report.METRICS} | {"joint_gain"}
    values = {"base": [5.0] * 3, "ce": [4.0, 4.1, 4.2], "earm": earm}
    values.update({name: control for name in ("ce-time", "control", "noise")})
    results = {name: {key: list(v) for key in keys} for name, v in values.items()}
    del results["noise"]["bleu_reranked"]
    for key in ("dv", "dv_per_source"):
        results["earm"][key] = [dv, dv + 0.01, dv + 0.02]
    return results


def kl_line(lines):
    return next(line for line in lines if "KL of q to the truth" in line)


def test_verdict_judges_against_each_control():
    lines = verdict.verdicts(fake_results([2.9, 3.41, 3.9], [3.0, 3.5, 4.0]))
    assert [lines.count(f"E-ARM minus {name}:") for name in ("control, likelihood", "control, noise")] == [1, 1]
    assert sum("KL of q to the truth" in line for line in lines) == 4  # each control, equal time, for proportion
    assert sum("BLEU reranked" in line for line in lines) == 1


def test_verdict_tells_a_clear_difference_from_noise():
    control = [3.0, 3.5, 4.0]
    assert "is better" in kl_line(verdict.verdicts(fake_results([2.9, 3.41, 3.9], control)))
    assert "is worse" in kl_line(verdict.verdicts(fake_results([3.1, 3.61, 4.1], control)))
    assert "does not tell them apart" in kl_line(verdict.verdicts(fake_results([2.8, 3.7, 4.0], control)))


def test_verdict_on_the_energy_follows_the_bound():
    said = {dv: "\n".join(verdict.verdicts(fake_results([3.0] * 3, [3.0] * 3, dv))) for dv in (-0.1, 0.1)}
    assert "has learnt nothing" in said[-0.1] and "has learnt nothing" not in said[0.1]
    assert "tells data from the model's samples" in said[0.1]


def test_one_seed_supports_nothing():
    difference = verdict.paired([1.0], [2.0])
    assert difference.mean == -1 and not difference.is_clear
    assert "one seed" in verdict.words(difference)
