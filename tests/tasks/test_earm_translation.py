import logging
import math
import re
import subprocess
import sys

import pytest
from fairseq.checkpoint_utils import load_model_ensemble_and_task
from fairseq.tasks.translation import TranslationTask

from fairseq_earm.cli.nbest import read_nbest
from fairseq_earm.compat import computes_half_on_cpu
from tests.tiny_translation import ARCH, OPTIMISATION, PLUGIN, command, generate, tagged

BEAM = ["--beam", 4, "--nbest", 4]
SAMPLING = [*BEAM, "--sampling", "--seed", 3]
RERANK = ["--energy-rerank"]


@pytest.mark.parametrize(
    "search",
    [
        BEAM,
        [*BEAM, "--unnormalized"],
        [*BEAM, "--lenpen", 0.5, "--prefix-size", 1],
        SAMPLING,
        [*SAMPLING, "--sampling-topk", 5],
        [*SAMPLING, "--sampling-topp", 0.8, "--temperature", 0.7],
    ],
    ids=lambda search: " ".join(map(str, search[4:])) or "beam",
)
def test_weight_zero_prints_what_the_stock_task_prints(tiny, search):
    stock = generate(tiny, *search, task="translation")
    assert len(tagged(stock, "H")) == 7
    assert generate(tiny, *search) == stock
    assert generate(tiny, *search, *RERANK, "--energy-weight", 0) == stock


def test_printed_scores_order_and_translations(tiny):
    """H-lines are (log q + weight · log μ) / length^lenpen in base 2 and sorted, P-lines stay those of the stock task."""
    stock = generate(tiny, *BEAM, task="translation")
    energy = generate(tiny, *BEAM, *RERANK, "--energy-weight", 20, "--lenpen", 0.7)
    moved = 0
    for sentence, lines in tagged(energy, "H").items():
        scores, texts = zip(*(line.split("\t") for line in lines))
        assert list(map(float, scores)) == sorted(map(float, scores), reverse=True)
        assert tagged(energy, "D")[sentence] == lines
        before = [line.split("\t")[1] for line in tagged(stock, "H")[sentence]]
        assert sorted(texts) == sorted(before)
        assert sorted(tagged(energy, "P")[sentence]) == sorted(tagged(stock, "P")[sentence])
        moved += list(texts) != before
    assert moved
    few = tagged(generate(tiny, "--beam", 4, "--nbest", 2, *RERANK, "--energy-weight", 20, "--lenpen", 0.7), "H")
    assert few == {sentence: lines[:2] for sentence, lines in tagged(energy, "H").items()}


def test_scores_do_not_depend_on_the_references_padding(tiny):
    left, right = (generate(tiny, *BEAM, *RERANK, *side, subset="valid") for side in (["--left-pad-target"], []))
    assert left == right


def test_ensembles_generate(tiny):
    stock = generate(tiny, *BEAM, task="translation", models="ab")
    assert generate(tiny, *BEAM, *RERANK, "--energy-weight", 0, models="ab") == stock
    energy = generate(tiny, *BEAM, *RERANK, "--energy-step", "post", models="ab")
    assert tagged(energy, "H") != tagged(stock, "H")
    assert {k: sorted(v) for k, v in tagged(energy, "P").items()} == {k: sorted(v) for k, v in tagged(stock, "P").items()}


def test_resampling_is_repeatable_by_the_seed(tiny):
    def translations(seed):
        search = ["--beam", 6, "--nbest", 6, "--sampling", "--seed", seed]
        return tagged(generate(tiny, *search, *RERANK, "--energy-select", "resample", subset="valid"), "H")

    first = translations(3)
    assert first == translations(3) != translations(4)
    sorted_by_score = tagged(generate(tiny, "--beam", 6, "--nbest", 6, "--sampling", "--seed", 3, *RERANK, subset="valid"), "H")
    assert first != sorted_by_score
    assert {k: sorted(v) for k, v in first.items()} == {k: sorted(v) for k, v in sorted_by_score.items()}


def test_interactive_orders_as_generate_does(tiny):
    search = [*BEAM, "--max-len-b", 12, *RERANK, "--energy-weight", 20]
    sources = [line.split("\t")[-1] for _, (line,) in sorted(tagged(generate(tiny, *search), "S").items())]
    where = [tiny.data, "--path", tiny.a, "--task", "earm_translation", "--cpu", "--buffer-size", 7, "--batch-size", 7]
    printed = command("interactive", *where, *search, stdin="\n".join(sources) + "\n")
    expected = tagged(generate(tiny, *search), "H")
    for sentence, lines in tagged(printed, "H").items():
        scores, texts = zip(*(line.split("\t") for line in lines))
        assert texts == tuple(line.split("\t")[1] for line in expected[sentence])
        assert list(map(float, scores)) == pytest.approx([float(line.split("\t")[0]) for line in expected[sentence]], abs=1e-4)
    assert len(tagged(printed, "H")) == 7


def test_constraints_alignments_and_prefixes_work(tiny):
    where = [tiny.data, "--path", tiny.a, "--task", "earm_translation", "--cpu", "--max-len-b", 12, *BEAM]
    constrained = ["--constraints", "--batch-size", 1, "--buffer-size", 1]
    stdin = "a b c\tx\n"
    stock = command("interactive", *where, *constrained, stdin=stdin)
    energy = command("interactive", *where, *constrained, *RERANK, stdin=stdin)
    texts = [sorted(line.split("\t")[1] for line in tagged(printed, "H")[0]) for printed in (stock, energy)]
    assert texts[0] == texts[1]
    aligned = generate(tiny, *BEAM, *RERANK, "--print-alignment", "hard")
    assert len(tagged(aligned, "A")) == 7
    prefixed = generate(tiny, *BEAM, *RERANK, "--prefix-size", 2)
    for sentence, (reference,) in tagged(prefixed, "T").items():
        for line in tagged(prefixed, "H")[sentence]:
            assert line.split("\t")[1].split()[:2] == reference.split()[:2]


@pytest.mark.parametrize("subset, size", [("test", 7), ("valid", 60), ("train", 403)])
def test_generation_loses_no_sentence(tiny, subset, size):
    printed = generate(tiny, "--beam", 1, "--batch-size", 16, "--max-len-b", 2, subset=subset)
    assert sorted(tagged(printed, "H")) == list(range(size))


def test_validation_loses_no_sentence(tiny, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    flags = ["--task", "earm_translation", "--criterion", "cross_entropy", "--max-update", 1, "--no-save"]
    subsets = ["--valid-subset", "valid,test", "--batch-size-valid", 64, "--save-dir", tmp_path]
    command("train", tiny.data, *ARCH, *OPTIMISATION, *flags, *subsets)
    sizes = {r.name: re.search(r"bsz (\d+)", r.message).group(1) for r in caplog.records if " | valid on " in r.message}
    assert sizes == {"valid": "60", "test": "7"}


def test_fairseq_validate_loses_no_sentence(tiny, caplog):
    caplog.set_level(logging.INFO)
    flags = ["--task", "earm_translation", "--valid-subset", "test", "--batch-size", 64, "--cpu", "--num-workers", 0, "--no-progress-bar"]
    command("validate", tiny.data, "--path", tiny.a, *flags)
    assert any(r.name == "test" and "bsz 7" in r.message for r in caplog.records), caplog.text


def test_training_batches_are_those_of_the_installed_fairseq(tiny):
    task = load_model_ensemble_and_task([str(tiny.a)])[2]
    task.load_dataset("train")
    flags = {"max_sentences": 16, "required_batch_size_multiple": 8, "seed": 1, "epoch": 1, "disable_iterator_cache": True}
    ours = task.get_batch_iterator(task.dataset("train"), **flags)
    stock = TranslationTask.get_batch_iterator(task, task.dataset("train"), **flags)
    ours, stock = ([list(batch) for batch in iterator.frozen_batches] for iterator in (ours, stock))
    assert ours == stock and len(stock) in (25, 26)  # of 403 sentences, the fork leaves out 3


OPEN = """
import argparse, sys, torch
getattr(torch.serialization, "add_safe_globals", list)([argparse.Namespace])
from fairseq import checkpoint_utils, options, tasks
task = tasks.setup_task(options.parse_args_and_arch(options.get_generation_parser(), sys.argv[1:]))
checkpoint_utils.load_model_ensemble([sys.argv[3]], task=task)
assert "fairseq_earm" not in sys.modules
"""


def test_checkpoints_open_under_the_stock_task_without_the_plugin(tiny):
    arguments = [tiny.data, "--path", tiny.a, "--task", "translation"]
    assert subprocess.run([sys.executable, "-c", OPEN, *map(str, arguments)]).returncode == 0


def test_bleu_during_training_is_of_the_reranked_translations(tiny, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    flags = ["--task", "earm_translation", "--criterion", "cross_entropy", "--max-update", 1, "--no-save", *RERANK]
    bleu = ["--eval-bleu", "--eval-bleu-args", '{"beam": 2, "max_len_b": 5}', "--save-dir", tmp_path]
    command("train", tiny.data, *ARCH, *OPTIMISATION, *flags, *bleu)
    assert "energy reranking: " in caplog.text
    assert any("bleu" in r.message for r in caplog.records if r.name == "valid")


def test_real_command_writes_what_tuning_reads(tiny):
    """Wherever the installed fairseq sends its log, output and log together give back log μ."""
    arguments = [tiny.data, "--path", tiny.a, "--user-dir", PLUGIN, "--task", "earm_translation", "--energy-weight", 0.5]
    flags = ["--gen-subset", "test", "--cpu", "--lenpen", 0.8, "--max-len-b", 12, *BEAM, *RERANK, "--num-workers", 0]
    run = [sys.executable, "-c", "from fairseq_cli.generate import cli_main; cli_main()", *map(str, arguments + flags)]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    settings = '{"energy_weight": 0.5, "lenpen": 0.8, "select": "best", "energy_step": "last"}'
    assert f"energy reranking: {settings}" in done.stdout + done.stderr
    files = {"out": done.stdout, "log": done.stderr, "plain": generate(tiny, *BEAM, *RERANK)}
    paths = {name: tiny.folder / f"subprocess.{name}" for name in files}
    for name, text in files.items():
        paths[name].write_text(text)
    here = read_nbest([str(paths["plain"])], weight=1.0, lenpen=1.0)
    there = read_nbest([str(paths["out"]), str(paths["log"])])
    for sentence, texts in enumerate(here.texts):
        row = dict(zip(texts, here.log_mu[sentence]))
        assert dict(zip(there.texts[sentence], there.log_mu[sentence])) == pytest.approx(row, abs=2e-3)


@pytest.mark.parametrize("value", ["-1", "nan", "inf"])
def test_bad_weights_are_named(tiny, value):
    with pytest.raises(SystemExit, match=f"--energy-weight {float(value)} is not a finite number of 0 or more"):
        generate(tiny, *BEAM, *RERANK, f"--energy-weight={value}")


def test_resampling_one_candidate_is_an_error(tiny):
    with pytest.raises(SystemExit, match="--energy-select resample has nothing to draw from with --beam 1"):
        generate(tiny, "--beam", 1, *RERANK, "--energy-select", "resample")


def test_scoring_references_is_an_error(tiny):
    with pytest.raises(SystemExit, match="--score-reference"):
        generate(tiny, *RERANK, "--score-reference")


def test_an_adaptive_softmax_trains_and_reranks(tiny, adaptive):
    """By the stock criterion until E-ARM starts, which fairseq's own log-probabilities do not allow."""
    assert all(math.isfinite(value) for entry in adaptive.log() for value in entry.values()) and "earm_dv" in adaptive.log()[-1]
    model = type(tiny)(data=tiny.data, a=adaptive.folder / "checkpoint_last.pt")
    stock, energy = (tagged(generate(model, *BEAM, *extra), "H") for extra in ([], [*RERANK, "--energy-weight", 20]))
    texts = [{number: [line.split("\t")[1] for line in lines] for number, lines in side.items()} for side in (stock, energy)]
    assert len(stock) == 7 and texts[0] != texts[1]
    assert {n: sorted(lines) for n, lines in texts[0].items()} == {n: sorted(lines) for n, lines in texts[1].items()}


def test_energy_flags_without_reranking_are_reported(tiny, caplog):
    stock = generate(tiny, *BEAM)
    caplog.clear()
    assert generate(tiny, *BEAM, "--energy-weight", 0.5, "--energy-select", "resample") == stock
    assert "--energy-weight 0.5, --energy-select resample without --energy-rerank: no effect" in caplog.text
    caplog.clear()
    generate(tiny, *BEAM)
    assert "no effect" not in caplog.text


@pytest.mark.skipif(not computes_half_on_cpu(), reason="this torch has no half precision on CPU")
def test_half_precision_generates(tiny):
    half = generate(tiny, *BEAM, *RERANK, "--fp16")
    assert all(math.isfinite(float(line.split("\t")[0])) for lines in tagged(half, "H").values() for line in lines)
