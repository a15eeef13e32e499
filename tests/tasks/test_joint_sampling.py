"""Joint sampling through fairseq-generate and fairseq-interactive, with a base that stock commands trained."""
import logging
import math
import re

import pytest
import torch
from fairseq import checkpoint_utils

from fairseq_earm.sampling.blocks import load_blocks
from fairseq_earm.sampling.continuation import score_continuations
from tests.tiny_energy import LENGTH, PREFIX, TASK
from tests.tiny_language import ARCH, TEXT
from tests.tiny_translation import OPTIMISATION, command, recorded_log, tagged

SAMPLING = ["--sampling", "--seed", 3]
JOINT = [*SAMPLING, "--energy-candidates", 40]


def settings(text, *arguments, base=None, data=None):
    common = ["--cpu", "--num-workers", 0, "--no-progress-bar"]
    return [data or text.data, *TASK, "--path", base or text.base, *common, *arguments]


def generate(text, *arguments, **paths):
    return command("generate", *settings(text, *arguments, **paths))


def interactive(text, lines, *arguments):
    return command("interactive", *settings(text, *arguments), stdin=lines)


def words(dictionary, tokens):
    """As fairseq prints them: without end-of-sentence."""
    return dictionary.string(tokens)


def values(line):
    return [float(value) for value in line.split()]


def load(path):
    return checkpoint_utils.load_model_ensemble([str(path)])[0][0].eval()


def test_printed_lines_are_what_they_are_said_to_be(text, energy):
    """S prefix, T continuation, P log q of each token and H the joint score per token, in base 2."""
    with recorded_log() as records:
        printed = generate(text, *JOINT, "--energy-path", energy)
    base, network = load(text.base), load(energy)
    dictionary = base.decoder.dictionary
    blocks = load_blocks(f"{text.data}/test", dictionary, sequence_length=LENGTH)
    assert set(tagged(printed, "H")) == set(range(len(blocks)))
    energies = []
    for number, block in enumerate(blocks):
        assert tagged(printed, "S")[number] == [words(dictionary, block[:PREFIX])]
        assert tagged(printed, "T")[number] == [words(dictionary, block[PREFIX:])]
        (score, drawn), token_scores = tagged(printed, "H")[number][0].split("\t"), values(tagged(printed, "P")[number][0])
        assert tagged(printed, "D")[number] == tagged(printed, "H")[number]
        assert len(token_scores) == LENGTH - PREFIX
        tokens = dictionary.encode_line(drawn, add_if_not_exist=False, append_eos=False).long()
        if len(tokens) < LENGTH - PREFIX:
            continue  # an end-of-sentence is in it, which fairseq does not print
        row = torch.cat([block[:PREFIX], tokens]).unsqueeze(0)
        log_q = score_continuations(base, row, PREFIX, pad=dictionary.pad(), eos=dictionary.eos())[0]
        assert token_scores == pytest.approx((log_q / math.log(2)).tolist(), abs=2e-4)
        with torch.no_grad():
            joint = (log_q.sum() - network(row)[0]) / math.log(2) / (LENGTH - PREFIX)
        assert float(score) == pytest.approx(joint.item(), abs=1e-3)
        energies.append(joint.item() - log_q.sum().item() / math.log(2) / (LENGTH - PREFIX))
    assert len(energies) > 3 and max(energies) - min(energies) > 0.1
    reports = [r.getMessage() for r in records if r.name == "fairseq_earm.joint_generation" and r.levelno == logging.INFO]
    assert re.match(r"effective sample size of 40 candidates: mean [\d.]+, least [\d.]+, over 19 prefixes", reports[-1])


def test_without_an_energy_it_samples_from_the_base(text):
    printed = generate(text, *SAMPLING, "--beam", 3, "--nbest", 3)
    for number, lines in tagged(printed, "H").items():
        assert len(lines) == 3
        for line, scores in zip(lines, tagged(printed, "P")[number]):
            assert float(line.split("\t")[0]) == pytest.approx(sum(values(scores)) / (LENGTH - PREFIX), abs=1e-3)


def test_draws_follow_the_seed_and_the_energy(text, energy):
    def drawn(*arguments):
        return tagged(generate(text, *JOINT, "--sampling-topk", 5, *arguments), "H")

    with_energy = ["--energy-path", energy]
    first = drawn(*with_energy)
    assert first == drawn(*with_energy) != drawn(*with_energy, "--seed", 4)
    assert first != drawn(*with_energy, "--energy-select", "best") != drawn(*with_energy, "--temperature", 0.5)


def test_best_is_sorted_by_score(text, energy):
    printed = generate(text, *JOINT, "--energy-path", energy, "--energy-select", "best", "--beam", 40, "--nbest", 40)
    for lines in tagged(printed, "H").values():
        scores = [float(line.split("\t")[0]) for line in lines]
        assert len(scores) == 40 and scores == sorted(scores, reverse=True) and scores[0] > scores[-1]


def test_chunks_are_those_asked_for(text, energy, monkeypatch):
    from fairseq_earm.models.energy_transformer import EnergyModel

    forward, sizes = EnergyModel.forward, set()
    monkeypatch.setattr(EnergyModel, "forward", lambda self, tokens: sizes.add(tokens.size(0)) or forward(self, tokens))
    generate(text, *JOINT, "--energy-path", energy, "--energy-chunk", 15)
    assert sizes == {15, 10}
    sizes.clear()
    generate(text, *JOINT, "--energy-path", energy, "--max-tokens", 8 * LENGTH)
    assert sizes == {8}


def test_a_typed_line_is_the_prefix(text, energy):
    printed = interactive(text, "a b b a\n\na a a c c c c a\n", *JOINT, "--energy-path", energy, "--beam", 2, "--nbest", 2)
    assert tagged(printed, "S") == {0: ["a b b a"], 1: [""], 2: ["a a a c c c c a"]}
    assert {len(lines) for lines in tagged(printed, "H").values()} == {2}
    base = load(text.base)
    dictionary, compared = base.decoder.dictionary, 0
    for number, prefix in enumerate(["a b b a", "", "a a a c c c c a"]):
        given = dictionary.encode_line(prefix, add_if_not_exist=False, append_eos=False).long()
        for line, scores in zip(tagged(printed, "H")[number], tagged(printed, "P")[number]):
            tokens = dictionary.encode_line(line.split("\t")[1], add_if_not_exist=False, append_eos=False).long()
            if len(tokens) < LENGTH - PREFIX:
                continue
            row = torch.cat([given, tokens]).unsqueeze(0)
            log_q = score_continuations(base, row, len(given), pad=dictionary.pad(), eos=dictionary.eos())[0]
            assert values(scores) == pytest.approx((log_q / math.log(2)).tolist(), abs=2e-4)
            compared += 1
    assert compared


def test_lines_of_several_lengths_in_one_batch(text, energy):
    lines = "a b b a\n\na a a c c c c a\nb\n"
    printed = interactive(text, lines, *JOINT, "--energy-path", energy, "--buffer-size", 4, "--batch-size", 4)
    assert tagged(printed, "S") == {0: ["a b b a"], 1: [""], 2: ["a a a c c c c a"], 3: ["b"]}
    assert {len(values(p)) for lines in tagged(printed, "P").values() for p in lines} == {LENGTH - PREFIX}


def test_a_line_that_leaves_no_room(text, energy):
    with pytest.raises(SystemExit, match="a prefix of 9 tokens leaves no room for 4 more"):
        interactive(text, "a a a a a a a a a\n", *JOINT, "--energy-path", energy)


@pytest.fixture(scope="module")
def other(text, tmp_path_factory):
    """The same kind of text with another dictionary, of the same size."""
    folder = tmp_path_factory.mktemp("other")
    lines = (text.folder / "train.txt").read_text().translate(str.maketrans("abcdef", "fedcba"))
    (folder / "train.txt").write_text(lines)
    # Stock fairseq loads the validation set even where it is not to be validated on.
    splits = [f"--{split}pref={folder / 'train.txt'}" for split in ("train", "valid")]
    command("preprocess", "--only-source", *splits, "--destdir", folder / "data", "--workers", 1)
    save = ["--save-dir", folder / "base", "--criterion", "cross_entropy", "--disable-validation", "--max-update", 1]
    command("train", folder / "data", *TEXT, *ARCH, *OPTIMISATION, *save)
    return folder / "base" / "checkpoint_last.pt"


def test_bad_settings_end_with_one_line(text, energy, other):
    joint = [*JOINT, "--energy-path", energy]
    missing = text.folder / "missing.pt"
    for arguments, paths, message in (
        (["--energy-path", energy], {}, "add --sampling"),
        ([*joint, "--energy-candidates", 1], {}, "--energy-candidates 1 leaves nothing"),
        ([*joint, "--energy-chunk", -1], {}, "--energy-chunk -1"),
        (JOINT, {}, "give its checkpoint as --energy-path"),
        ([*joint, "--energy-path", missing], {}, "--energy-path .*missing.pt: there is no such file"),
        ([*joint, "--energy-path", text.base], {}, "--energy-path .* is a TransformerLanguageModel"),
        ([*joint, "--prefix-length", 7], {}, "--prefix-length 7 .* was trained with --prefix-length 8 --sequence-length 12"),
        ([*joint, "--max-len-b", 7], {}, "--max-len-b means nothing"),
        ([*joint, "--temperature", 0], {}, "--temperature 0.* above 0"),
        ([*joint, "--sampling-topk", 17], {}, "--sampling-topk 17: give 1 to 16"),
        ([*joint, "--sampling-topk", 5, "--sampling-topp", 0.5], {}, "--sampling-topk 5 and --sampling-topp 0.5: give one"),
        ([*joint, "--score-reference"], {}, "--score-reference means nothing"),
        (joint, {"base": missing}, "--path .*missing.pt: there is no such file"),
        (joint, {"base": energy}, "--path .* is a BidirectionalEnergyTransformer"),
        (joint, {"base": f"{text.base}:{text.base}"}, "--path names 2 models"),
        (joint, {"base": other}, "--path .* its source dictionary is not the data's: index 4 is"),
        ([*joint, "--sequence-length", 16], {}, "--sequence-length 16: --path .* has 12 positions"),
    ):
        with pytest.raises(SystemExit, match=message):
            generate(text, *arguments, **paths)


def test_an_energy_of_another_dictionary(text, energy, other, tmp_path):
    state = torch.load(energy, map_location="cpu", weights_only=False)
    state["cfg"]["task"]["data"] = str(other.parents[1] / "data")
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(SystemExit, match="--energy-path .* its source dictionary is not the data's"):
        generate(text, *JOINT, "--energy-path", tmp_path / "other.pt")


def test_an_energy_that_has_diverged(text, energy, tmp_path):
    state = torch.load(energy, map_location="cpu", weights_only=False)
    state["model"]["energy_projection.bias"].fill_(math.nan)
    torch.save(state, tmp_path / "nan.pt")
    with pytest.raises(SystemExit, match="energies are not finite"):
        generate(text, *JOINT, "--energy-path", tmp_path / "nan.pt")


def test_another_base_than_the_energy_s_own_is_warned_about(text, energy, tmp_path, caplog):
    state = torch.load(text.base, map_location="cpu", weights_only=False)
    state["more"] = 1
    torch.save(state, tmp_path / "other.pt")
    generate(text, *JOINT, "--energy-path", energy)
    assert "is not the base that" not in caplog.text
    generate(text, *JOINT, "--energy-path", energy, base=tmp_path / "other.pt")
    assert f"--path {tmp_path / 'other.pt'} is not the base that --energy-path {energy} was trained on, {text.base}" in caplog.text
