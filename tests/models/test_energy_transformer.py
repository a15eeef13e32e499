"""What a state sees, what padding does, and what becomes of the states."""
from types import SimpleNamespace

import pytest
import torch

from fairseq_earm.compat import computes_half_on_cpu
from fairseq_earm.models.energy_init import UNTRAINED
from tests.models.networks import DICTIONARY, network, sequences
from tests.tiny_model import tiny_dictionary

BOTH = pytest.mark.parametrize("name", ["unit", "bit"])
HALF = pytest.mark.skipif(not computes_half_on_cpu(), reason="this torch has no half precision on CPU")


def replaced(tokens, position):
    """The sequences with another word at one position."""
    changed, first = tokens.clone(), DICTIONARY.nspecial
    changed[:, position] = first + (tokens[:, position] - first + 1) % (len(DICTIONARY) - first)
    return changed


@BOTH
def test_padding_changes_nothing(name):
    model, tokens = network(name), sequences(7, 1, 4)
    alone = torch.cat([model(tokens[row : row + 1, :length]) for row, length in enumerate((7, 1, 4))])
    padded = torch.cat([tokens, torch.full((3, 3), DICTIONARY.pad())], 1)
    assert alone.std() > 0.1
    torch.testing.assert_close(model(tokens), alone, rtol=0, atol=1e-6)
    torch.testing.assert_close(model(padded), alone, rtol=0, atol=1e-6)


@BOTH
def test_padding_changes_nothing_in_float32(name):
    model, tokens = network(name).float(), sequences(7, 1, 4)
    alone = torch.cat([model(tokens[row : row + 1, :length]) for row, length in enumerate((7, 1, 4))])
    torch.testing.assert_close(model(tokens), alone, rtol=0, atol=1e-5)


@BOTH
def test_energy_is_the_projected_mean_of_all_states(name):
    model, lengths = network(name), (5, 2)
    tokens = sequences(*lengths)
    states, real = model.states(tokens)
    assert real.tolist() == [[True] * 6, [True] * 3 + [False] * 3]
    for row, length in enumerate(lengths):
        mean = sum(states[row, place] for place in range(length + 1)) / (length + 1)
        by_hand = (mean * model.energy_projection.weight[0]).sum() + model.energy_projection.bias[0]
        torch.testing.assert_close(model(tokens)[row], by_hand)


def test_unit_never_looks_ahead():
    model, tokens = network("unit"), sequences(6, 6)
    states, _ = model.states(tokens)
    for position in range(6):
        changed, _ = model.states(replaced(tokens, position))
        moved = (changed - states).abs().amax(-1)  # the state of token t is at t + 1
        assert (moved[:, : position + 1] == 0).all()
        assert (moved[:, position + 1 :] > 1e-6).all()


def test_every_state_of_bit_sees_every_position():
    model, tokens = network("bit"), sequences(6, 6)
    states, _ = model.states(tokens)
    for position in range(6):
        changed, _ = model.states(replaced(tokens, position))
        assert ((changed - states).abs().amax(-1) > 1e-6).all()


@BOTH
def test_energy_depends_on_every_position_and_on_the_order(name):
    model, tokens = network(name), sequences(6, 6)
    for position in range(6):
        assert ((model(replaced(tokens, position)) - model(tokens)).abs() > 1e-6).all()
    assert ((model(tokens.flip(1)) - model(tokens)).abs() > 1e-6).all()


@pytest.mark.parametrize("name, start", [("unit", DICTIONARY.eos()), ("bit", DICTIONARY.bos())])
def test_the_start_token_is_that_of_pretraining(name, start):
    model, tokens, read = network(name), sequences(3, 2), []
    model.trunk.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    model(tokens)
    assert torch.equal(read[0], torch.cat([torch.tensor([[start], [start]]), tokens], 1))


@BOTH
def test_a_row_of_padding_is_the_empty_sequence(name):
    model = network(name)
    empty = model(torch.empty(1, 0, dtype=torch.long))
    tokens = sequences(3, 3)
    tokens[1] = DICTIONARY.pad()
    torch.testing.assert_close(model(tokens)[1:], empty)


@BOTH
@pytest.mark.parametrize("dtype", [pytest.param(torch.float16, marks=HALF), torch.bfloat16])
def test_half_precision_ends_in_float32(name, dtype):
    model, tokens = network(name), sequences(6, 2)
    exact = model(tokens)
    half = model.to(dtype)(tokens)
    assert half.dtype == torch.float32 and exact.dtype == torch.float64
    torch.testing.assert_close(half.double(), exact, rtol=0.05, atol=0.1)


@BOTH
def test_autocast_does_not_touch_the_projection(name):
    model, tokens = network(name).float(), sequences(6, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states, _ = model.states(tokens)
        energies = model(tokens)
    mean = states.float()[0].mean(0)
    assert energies.dtype == torch.float32
    torch.testing.assert_close(energies[0], mean @ model.energy_projection.weight[0] + model.energy_projection.bias[0])


@BOTH
def test_the_longest_sequence(name):
    model = network(name, max_positions=8, **({"decoder_learned_pos": True} if name == "unit" else {}))
    assert model.max_positions() == 7
    assert model(sequences(7)).isfinite().all()
    with pytest.raises(ValueError, match="8 tokens; the energy network reads 7 at most"):
        model(sequences(8))


@BOTH
def test_the_tasks_energy_dictionary_goes_first(name):
    other = tiny_dictionary(40)
    model = network(name, task=SimpleNamespace(source_dictionary=DICTIONARY, energy_dictionary=other))
    assert model.vocabulary_size == len(other)
    assert model.trunk.embed_tokens.num_embeddings == len(other)
    without = SimpleNamespace(source_dictionary=DICTIONARY, energy_dictionary=None)
    assert network(name, task=without).vocabulary_size == len(DICTIONARY)


@BOTH
def test_every_parameter_learns(name):
    model = network(name)
    model(sequences(6, 2)).pow(2).sum().backward()
    # A bias on keys moves all of a query's attention logits alike, to no effect.
    useful = {key: value.grad for key, value in model.named_parameters() if not key.endswith("k_proj.bias")}
    idle = [key for key, grad in useful.items() if grad is None or not grad.any()]
    assert [key for key in idle if not UNTRAINED.search(key)] == []
