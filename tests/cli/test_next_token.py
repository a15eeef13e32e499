"""Next-token probabilities against the enumerated joint model of a tiny language, and through the command."""
import json
import math

import pytest
import torch

from fairseq_earm.cli import next_token
from fairseq_earm.cli.next_token import next_tokens
from tests.test_joint_generation import Energy
from tests.tiny_language import enumerate_continuations, tiny_language_model

PREFIX = torch.tensor([4, 5, 4])


@pytest.fixture(scope="module")
def base():
    return tiny_language_model(words=4)


def exact(base, energy, rest, top_k):
    """(token → base probability, token → joint probability among these) by summing over all futures."""
    first = {x[0]: math.exp(p) for x, p in enumerate_continuations(base, PREFIX, 1).items()}
    kept = sorted(first, key=first.get, reverse=True)[:top_k]
    joint = dict.fromkeys(kept, 0.0)
    for continuation, log_prob in enumerate_continuations(base, PREFIX, rest + 1).items():
        if continuation[0] in joint:
            sequence = torch.tensor([[*PREFIX.tolist(), *continuation]])
            joint[continuation[0]] += math.exp(log_prob - energy(sequence).item())
    total = sum(joint.values())
    return {token: first[token] for token in kept}, {token: mass / total for token, mass in joint.items()}


def test_joint_probabilities_are_within_their_errors_of_the_exact_ones(base):
    energy = Energy(1.5)
    base_exact, joint_exact = exact(base, energy, 2, 4)
    generator = torch.Generator().manual_seed(1)
    found = next_tokens(base, energy, PREFIX, top_k=4, rest=2, samples=4000, chunk=700, generator=generator)
    assert found.tokens.tolist() == list(base_exact)
    assert found.base.tolist() == pytest.approx(list(base_exact.values()), abs=1e-6)
    errors = found.standard_error
    assert (0 < errors).all() and (errors < 0.02).all()
    assert ((found.joint - torch.tensor(list(joint_exact.values()))).abs() < 4 * errors).all()
    assert ((found.joint - found.base / found.base.sum()).abs() > 4 * errors).any(), "the energy matters"


def test_the_last_token_is_exact(base):
    energy = Energy(1.5)
    _, joint_exact = exact(base, energy, 0, 5)
    found = next_tokens(base, energy, PREFIX, top_k=5, rest=0, samples=7)
    assert found.joint.tolist() == pytest.approx(list(joint_exact.values()), abs=1e-9)
    assert found.standard_error.tolist() == [0.0] * 5


def run(text, *arguments, base=None):
    next_token.main([str(a) for a in (text.data, "--path", base or text.base, "--cpu", *arguments)])


def test_the_command_prints_and_writes_both_distributions(text, energy, tmp_path, capsys):
    path = tmp_path / "next.json"
    arguments = ["--energy-path", energy, "--prefix", "a b b a </s> c", "--top-k", 4, "--samples", 50, "--json", path]
    run(text, *arguments)
    printed = capsys.readouterr().out
    report = json.loads(path.read_text())
    assert (report["prefix"], report["rest"], report["samples"]) == ("a b b a </s> c", 3, 50)
    assert len(report["tokens"]) == 4
    for name in ("base_of_k", "joint_of_k"):
        assert sum(row[name] for row in report["tokens"]) == pytest.approx(1)
    for row in report["tokens"]:
        assert row["base"] == pytest.approx(row["base_of_k"] * report["base_share_of_k"])
        values = f"{row['base_of_k']:8.4f} {row['joint_of_k']:8.4f} {row['standard_error']:8.4f}"
        assert any(line.startswith(row["token"]) and values in line for line in printed.splitlines())
    run(text, *arguments)
    assert capsys.readouterr().out == printed
    run(text, *arguments, "--seed", 2)
    assert capsys.readouterr().out != printed


def test_how_much_comes_after_the_next_token(text, energy, tmp_path):
    for words, rest in ((0, 3), (8, 3), (9, 2), (11, 0)):
        path = tmp_path / "next.json"
        run(text, "--energy-path", energy, "--prefix", " ".join("a" * words), "--samples", 2, "--json", path)
        report = json.loads(path.read_text())
        assert report["rest"] == rest
        assert (report["tokens"][0]["standard_error"] == 0) == (rest == 0)


def test_bad_settings_end_with_one_line(text, energy, tmp_path):
    with_energy = ["--energy-path", energy, "--prefix", "a b"]
    for arguments, message in (
        ([*with_energy, "--prefix", " ".join("a" * 12)], "--prefix has 12 tokens, .* sequences of 12: shorten it to 11"),
        ([*with_energy, "--top-k", 1], "--top-k 1: give 2 to 15"),
        ([*with_energy, "--top-k", 16], "--top-k 16"),
        ([*with_energy, "--seed", 2**63], "--seed 9223372036854775808: give 0 or more, below"),
        ([*with_energy, "--samples", 1], "--samples 1 gives no standard error"),
        ([*with_energy, "--max-tokens", 0], "--max-tokens 0"),
        ([*with_energy, "--energy-path", text.base], "--energy-path .* is a TransformerLanguageModel"),
        ([*with_energy, "--json", tmp_path / "none" / "x.json", "--samples", 2], "--json .* there is no such folder"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(text, *arguments)
    with pytest.raises(SystemExit, match="--path .* is a BidirectionalEnergyTransformer"):
        run(text, *with_energy, base=energy)
    with pytest.raises(SystemExit, match="has no dict.txt"):
        next_token.main([str(tmp_path), "--path", str(text.base), *map(str, with_energy)])


def test_another_base_than_the_energy_s_own_is_warned_about(text, energy, tmp_path, caplog):
    arguments = ["--energy-path", energy, "--prefix", "a b", "--samples", 2]
    run(text, *arguments)
    assert "is not the base that" not in caplog.text
    state = torch.load(text.base, map_location="cpu", weights_only=False)
    torch.save({**state, "more": 1}, tmp_path / "other.pt")
    run(text, *arguments, base=tmp_path / "other.pt")
    assert "other.pt is not the base that --energy-path" in caplog.text
