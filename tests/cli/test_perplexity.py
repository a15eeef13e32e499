"""fairseq-earm-perplexity on trained models, against sums over all continuations."""
import itertools
import json
import logging
import math
from types import SimpleNamespace

import pytest
import torch
from fairseq import checkpoint_utils

from fairseq_earm.cli import perplexity
from fairseq_earm.cli.joint_setup import spread
from fairseq_earm.errors import UsageError
from fairseq_earm.sampling.blocks import load_blocks
from tests.tiny_energy import LENGTHS, SIZES
from tests.tiny_language import ARCH, TEXT
from tests.tiny_translation import command, train



@pytest.fixture
def residual(text, energy):
    """Base and energy network, and the data of both."""
    return SimpleNamespace(data=text.data, base=text.base, energy=energy)


def run(data, base, *arguments):
    perplexity.main([str(argument) for argument in (data, "--path", base, "--cpu", *arguments)])


def measure(residual, path, *arguments):
    """The JSON that the command writes for the joint model."""
    run(residual.data, residual.base, "--energy-path", residual.energy, "--json", path, *arguments)
    return json.loads(path.read_text())


def load(path):
    return checkpoint_utils.load_model_ensemble([str(path)])[0][0].eval()


def own_energy(base):
    """What an E-ARM model says of whole sequences at their last step, by one pass over all of them."""
    eos = base.decoder.dictionary.eos()
    return lambda rows: -base(torch.cat([rows.new_full((len(rows), 1), eos), rows[:, :-1]], 1))[0][:, -1].logsumexp(-1)


def exact_figures(residual, prefix_length, indices, energy=None):
    """Perplexity of the joint model, and of its last step, over all continuations of two tokens."""
    base = load(residual.base)
    energy = load(residual.energy) if energy is None else energy(base)
    dictionary = base.decoder.dictionary
    words = [i for i in range(len(dictionary)) if i != dictionary.pad()]
    blocks = load_blocks(f"{residual.data}/test", dictionary, sequence_length=prefix_length + 2)
    whole, last = [], []
    for item in (blocks[index] for index in indices):
        ends = torch.tensor(list(itertools.product(words, repeat=2)))
        rows = torch.cat([item[:prefix_length].expand(len(ends), -1), ends], 1)
        with torch.no_grad():
            read = torch.cat([rows.new_full((len(rows), 1), dictionary.eos()), rows[:, :-1]], 1)
            logits = base(read)[0][:, prefix_length:]
            logits[:, :, dictionary.pad()] = -math.inf
            log_probs = logits.double().log_softmax(-1).gather(-1, ends.unsqueeze(-1)).sum((1, 2)) - energy(rows).double()
        mine = (ends == item[prefix_length:]).all(1)
        same_start = ends[:, 0] == item[prefix_length]
        whole.append((log_probs[mine] - log_probs.logsumexp(0)).item())
        last.append((log_probs[mine] - log_probs[same_start].logsumexp(0)).item())
    return math.exp(-sum(whole) / (2 * len(whole))), math.exp(-sum(last) / len(last))


def test_bounds_close_in_on_the_exact_perplexity_and_the_last_step_is_exact(residual, tmp_path, capsys):
    report = measure(
        residual, tmp_path / "out.json", "--prefix-length", 10, "--samples", 2000, 50, "--per-step", "--max-sequences", 3
    )
    printed = capsys.readouterr().out
    blocks = report["sequences"] + report["skipped"]
    whole, last = exact_figures(residual, 10, spread(19, 3))
    assert [row["samples"] for row in report["joint"]] == [50, 2000]
    few, many = report["joint"]
    # The bounds of log Z are about a variance apart; three sequences of two tokens.
    error = math.sqrt((many["log_z_upper"] - many["log_z_lower"]) / 3) / 2
    assert many["perplexity_lower"] == pytest.approx(whole, rel=3 * error)
    assert many["perplexity_upper"] == pytest.approx(whole, rel=3 * error)
    assert abs(whole - report["base"]["perplexity"]) > 4 * error * whole, "too weak an energy to tell the two apart"
    assert many["nll_upper"] - many["nll_lower"] < few["nll_upper"] - few["nll_lower"]
    assert report["steps"][1]["lower"] == report["steps"][1]["upper"] == pytest.approx(last, rel=1e-5)
    assert blocks == 4 and report["tokens"] == 6
    assert "first 10 tokens are given and the other 2" in printed and f"{many['perplexity_upper']:.4f}" in printed
    assert f"{report['steps'][1]['base']:.4f}" in printed and "End-of-sentence is a token" in printed


def test_lengths_are_those_of_the_energy_unless_given(residual, tmp_path, caplog):
    report = measure(residual, tmp_path / "out.json", "--samples", 2, "--max-sequences", 2)
    assert (report["settings"]["prefix_length"], report["settings"]["sequence_length"]) == (8, 12)
    assert not [r for r in caplog.records if r.levelno == logging.WARNING and r.name.startswith("fairseq_earm")]
    measure(residual, tmp_path / "out.json", "--samples", 2, "--max-sequences", 2, "--prefix-length", 9)
    assert "--prefix-length 9, but the energy was trained with 8" in caplog.text


def test_the_base_alone(text, tmp_path, capsys):
    """As the stock command scores it where nothing is given; that has other first tokens, and padding in its softmax."""
    path = tmp_path / "base.json"
    run(text.data, text.base, "--prefix-length", 0, "--sequence-length", 12, "--json", path, "--per-step")
    report = json.loads(path.read_text())
    assert report["sequences"] == 19 and report["skipped"] == 1 and "joint" not in report and len(report["steps"]) == 12
    assert report["base"]["perplexity"] == pytest.approx(math.exp(sum(math.log(s["base"]) for s in report["steps"]) / 12))
    assert "lower" not in capsys.readouterr().out
    model, dictionary = load(text.base), load(text.base).decoder.dictionary
    blocks = load_blocks(f"{text.data}/test", dictionary, sequence_length=12)
    tokens = torch.stack([blocks[i] for i in range(19)])
    read = torch.cat([tokens.new_full((19, 1), dictionary.eos()), tokens[:, :-1]], 1)
    with torch.no_grad():
        scores = model.get_normalized_probs(model(read), log_probs=True).gather(-1, tokens.unsqueeze(-1))
    assert report["base"]["nll"] == pytest.approx(-scores.mean().item(), abs=5e-3)


def test_sentences_that_lose_their_end_are_counted(text, tmp_path, capsys):
    words = [2] * 6 + [5] * 4 + [8] * 7
    (tmp_path / "some.txt").write_text("".join(" ".join("a" * count) + "\n" for count in words))
    where = ["--srcdict", text.data / "dict.txt", "--testpref", tmp_path / "some.txt", "--destdir", tmp_path / "data"]
    command("preprocess", "--only-source", *where, "--workers", 1)
    six = ["--sample-break-mode", "eos", "--prefix-length", 0, "--sequence-length", 6, "--json", tmp_path / "out.json"]
    for limit, cut, note in (([], 7, "; 7 longer sentences lost their end."), (["--max-sequences", 2], 1, "; 1 long")):
        run(tmp_path / "data", text.base, *six, *limit)
        printed, report = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
        assert (report["skipped"], report["cut"]) == (6, cut) and f"; 6 of another length skipped{note}" in printed
    run(text.data, text.base, *LENGTHS)
    assert "lost their end" not in capsys.readouterr().out


def test_data_read_ahead_give_the_same_figures(text, tmp_path, capsys):
    where = ["--srcdict", text.data / "dict.txt", "--testpref", text.folder / "train.txt", "--destdir", tmp_path]
    command("preprocess", "--only-source", *where, "--dataset-impl", "cached", "--workers", 1)
    capsys.readouterr()
    some = [*LENGTHS, "--max-sequences", 100]  # more than the text is told by, and not all of it
    run(text.data, text.base, "--gen-subset", "train", *some)
    expected = capsys.readouterr().out
    run(tmp_path, text.base, *some)
    assert capsys.readouterr().out == expected


def test_a_killed_run_goes_on_to_the_same_figures(residual, tmp_path, monkeypatch):
    arguments = ["--samples", 20, 10, "--per-step", "--max-sequences", 6, "--batch-size", 16]
    whole = measure(residual, tmp_path / "whole.json", *arguments)
    path, partial = tmp_path / "out.json", tmp_path / "out.json.partial"
    measured, original = [], perplexity.measure_sequence

    def killed_at_the_third(*rest, index, **settings):
        measured.append(index)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return original(*rest, index=index, **settings)

    monkeypatch.setattr(perplexity, "measure_sequence", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        measure(residual, path, *arguments)
    assert not path.exists()
    with partial.open("a") as file:
        file.write('{"index": 9, "base": [-1.2')  # killed while writing
    with pytest.raises(UsageError, match="another seed"):
        measure(residual, path, *arguments, "--seed", 2)
    report = measure(residual, path, *arguments)
    assert measured == [0, 3, 6, 6, 9, 12, 15]
    assert report == whole and not partial.exists()


def test_another_run_s_partial_results_are_refused_and_damaged_ones_too(residual, tmp_path):
    path, partial = tmp_path / "out.json", tmp_path / "out.json.partial"
    partial.write_text('{"settings": {"samples": [30]}}\n')
    with pytest.raises(UsageError, match=r"out.json.partial holds part of a run with another .*delete it"):
        measure(residual, path, "--samples", 20)
    partial.write_text("no JSON\n")
    with pytest.raises(UsageError, match="damaged: delete it"):
        measure(residual, path, "--samples", 20)
    assert partial.read_text() == "no JSON\n"
    partial.write_text('{"settings": {"sam')  # killed at the very first line
    assert measure(residual, path, "--samples", 20, "--max-sequences", 1)["sequences"] == 1


def test_numbers_of_samples_with_and_without_commas(residual, tmp_path):
    ways = (["--samples", "4,2", "8"], ["--samples", 8, 4, "--samples", 2], ["--samples", "2,4,8"])
    first, *others = (measure(residual, tmp_path / "out.json", "--max-sequences", 1, *way) for way in ways)
    assert [row["samples"] for row in first["joint"]] == [2, 4, 8] and all(first == other for other in others)


def test_spread_is_even_and_never_more_than_there_is():
    assert spread(10, 4) == [0, 2, 5, 7] and spread(3, 9) == [0, 1, 2] == spread(3, None)


def refused(capsys, *arguments):
    """The one line with which the command ends."""
    with pytest.raises(UsageError) as error:
        run(*arguments)
    assert "perplexity" not in capsys.readouterr().out
    return str(error.value)


def test_bad_input_is_one_clear_line(residual, text, tiny, tmp_path, capsys):
    joint = [residual.data, residual.base, "--energy-path", residual.energy]
    alone = [text.data, text.base, *LENGTHS]
    assert "--prefix-length 12 of --sequence-length 12 leaves nothing" in refused(capsys, *joint, "--prefix-length", 12)
    assert "--prefix-length -1" in refused(capsys, *joint, "--prefix-length", -1)
    assert "--prefix-length is missing" in refused(capsys, text.data, text.base)
    assert "no sequence that long" in refused(capsys, *alone, "--sample-break-mode", "eos")
    assert "--sequence-length 9999" in refused(capsys, *joint, "--sequence-length", 9999)
    assert "give a language model" in refused(capsys, text.data, residual.energy, *LENGTHS)
    assert "give an energy network" in refused(capsys, text.data, text.base, "--energy-path", text.base)
    assert "--samples 1:" in refused(capsys, *joint, "--samples", 1, 10)
    assert "--samples is for a normaliser" in refused(capsys, *alone, "--samples", 10)
    assert "--energy-step post: text has no last step" in refused(capsys, *alone, "--energy", "earm", "--energy-step", "post")
    assert "--energy-step post: only a model's own" in refused(capsys, *joint, "--energy-step", "post")
    assert "--prefix-length is missing" in refused(capsys, text.data, text.base, "--energy", "earm")
    assert "--batch-size 0" in refused(capsys, *alone, "--batch-size", 0)
    assert "--max-sequences 0" in refused(capsys, *alone, "--max-sequences", 0)
    assert "--max-len-a -1" in refused(capsys, *alone, "--max-len-a", -1)
    assert "--max-len-a nan --max-len-b 10: give finite" in refused(capsys, tiny.data, tiny.a, "--max-len-a", "nan")
    assert "--max-len-a 0 --max-len-b 0: give" in refused(capsys, tiny.data, tiny.a, "--max-len-a", 0, "--max-len-b", 0)
    assert "--max-len-a 1.5 --max-len-b 3: for pairs" in refused(capsys, *alone, "--max-len-b", 3)
    assert "there is no such folder" in refused(capsys, *alone, "--json", tmp_path / "none" / "out.json")
    assert "there is no such folder" in refused(capsys, tmp_path / "none", text.base)
    for data, base in ((text.data, text.base), (tiny.data, tiny.a)):
        assert f"{data}:{data} names 2 folders, and this command reads one" in refused(capsys, f"{data}:{data}", base)
    assert "there is no such file" in refused(capsys, text.data, tmp_path / "none.pt", *LENGTHS)
    assert "no such split" in refused(capsys, *alone, "--gen-subset", "none")
    assert "dictionary is not the data's" in refused(capsys, text.data, tiny.a, *LENGTHS)
    assert "--prefix-length is for text" in refused(capsys, tiny.data, tiny.a, "--prefix-length", 8)
    assert "--per-step is for text" in refused(capsys, tiny.data, tiny.a, "--per-step")
    assert "no such split" in refused(capsys, tiny.data, tiny.a, "--gen-subset", "none")
    assert "there is no such file" in refused(capsys, tiny.data, tmp_path / "none.pt")
    assert "not a checkpoint" in refused(capsys, tiny.data, text.base)
    (tmp_path / "out.json.partial").mkdir()
    assert "cannot be" in refused(capsys, *alone, "--json", tmp_path / "out.json")


def test_energies_that_are_no_numbers_name_the_sequence_and_lose_nothing(residual, tmp_path, capsys):
    state = torch.load(residual.energy, weights_only=False)
    state["model"]["energy_projection.bias"].fill_(float("nan"))
    torch.save(state, tmp_path / "nan.pt")
    line = refused(capsys, residual.data, residual.base, "--energy-path", tmp_path / "nan.pt", "--samples", 4)
    assert "sequence 0: its energy is nan" in line


def test_an_energy_of_another_base_is_warned_about(residual, text, tmp_path, caplog):
    state = torch.load(text.base, weights_only=False)
    state["extra"] = 1
    torch.save(state, tmp_path / "other.pt")
    run(text.data, tmp_path / "other.pt", "--energy-path", residual.energy, "--samples", 2, "--max-sequences", 1)
    assert "is not the base that --energy-path" in caplog.text


@pytest.fixture(scope="module")
def earm(text, tmp_path_factory):
    """A language model whose energies are strong after a few updates: its offset alone is trained further."""
    flags = [*TEXT, "--task", "earm_language_modeling", "--criterion", "earm_cross_entropy", "--earm-start-epoch", 1]
    weight = ["--earm-weight", 3, "--earm-energy-steps", "last", "--earm-recent-tokens", 0, "--earm-prefix-length", 10]
    run = train(text, tmp_path_factory.mktemp("earm"), *flags, *weight, "--finetune-from-model", text.base, arch=ARCH)
    return SimpleNamespace(data=text.data, base=run.folder / "checkpoint_last.pt")


def test_a_language_model_with_its_own_energies(earm, tmp_path, capsys):
    path = tmp_path / "out.json"
    sizes = ["--prefix-length", 10, "--sequence-length", 12, "--max-sequences", 6]
    run(earm.data, earm.base, "--energy", "earm", *sizes, "--samples", 4000, 50, "--per-step", "--json", path)
    report = json.loads(path.read_text())
    whole, last = exact_figures(earm, 10, spread(19, 6), own_energy)
    few, many = report["joint"]
    error = math.sqrt((many["log_z_upper"] - many["log_z_lower"]) / 6) / 2
    assert many["perplexity_lower"] == pytest.approx(whole, rel=3 * error)
    assert many["perplexity_upper"] == pytest.approx(whole, rel=3 * error)
    assert abs(whole - report["base"]["perplexity"]) > 4 * error * whole, "too weak an energy to tell the two apart"
    assert many["nll_upper"] - many["nll_lower"] < few["nll_upper"] - few["nll_lower"]
    assert report["steps"][1]["lower"] == report["steps"][1]["upper"] == pytest.approx(last, rel=1e-5)
    assert report["settings"]["energy"] == "earm last" and "first 10 tokens are given" in capsys.readouterr().out
    run(earm.data, earm.base, *sizes, "--json", path)
    assert json.loads(path.read_text())["base"] == report["base"]


def test_a_translation_model_with_its_own_energies(tiny, tmp_path, capsys):
    path = tmp_path / "out.json"
    run(tiny.data, tiny.a, "--energy", "earm", "--samples", 300, "--json", path, "--max-len-b", 5)
    report = json.loads(path.read_text())
    assert report["sequences"] == 7 and report["settings"]["energy"] == "earm last"
    assert "source sentence is given" in capsys.readouterr().out
    row = report["joint"][0]
    assert row["nll_lower"] <= row["nll_upper"] < row["nll_lower"] + 0.05
    run(tiny.data, tiny.a, "--json", path)
    assert json.loads(path.read_text())["base"] == report["base"]
    run(tiny.data, tiny.a, "--energy", "earm", "--energy-step", "post", "--samples", 300, "--json", path, "--max-len-b", 5)
    assert json.loads(path.read_text())["joint"][0]["nll_upper"] != row["nll_upper"]


def test_a_translation_model_with_an_energy_network(tiny, residual, tmp_path, capsys):
    task = ["--task", "residual_translation", "--criterion", "residual_nce", "--base-model", tiny.a, "--max-epoch", 1]
    network = train(tiny, tmp_path / "energy", *task, "--lr", 0.003, arch=["--arch", "bit_tiny", *SIZES]).folder / "checkpoint_last.pt"
    path = tmp_path / "out.json"
    run(tiny.data, tiny.a, "--energy-path", network, "--samples", 200, "--json", path)
    report = json.loads(path.read_text())
    row = report["joint"][0]
    assert report["sequences"] == 7 and row["nll_lower"] <= row["nll_upper"] < row["nll_lower"] + 0.05
    assert row["nll_upper"] != report["base"]["nll"]
    run(tiny.data, tiny.a, "--energy-path", network, "--samples", 2, "--max-sequences", 2, "--json", path)
    assert json.loads(path.read_text())["sequences"] == 2
    assert "there is no such file" in refused(capsys, tiny.data, tiny.a, "--energy-path", tmp_path / "none.pt")
    assert "give an encoder-decoder model" in refused(capsys, tiny.data, network)
