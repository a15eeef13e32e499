"""Settings of an energy's checkpoint, whatever they are: the commands take them, or say in one line that they cannot."""
import argparse
import copy
import os

import torch
from fairseq.data import Dictionary
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fairseq_earm.cli import joint_setup, next_token
from fairseq_earm.models.load_energy import load_energy
from tests.damage import VALUES, limits, read_or_refuse

EXAMPLES = int(os.environ.get("FAIRSEQ_EARM_FUZZ") or 1700) // 40
# Those whose size is that of a network: what a checkpoint claims there is made before its weights are looked at.
SIZES = ("dim", "layers", "heads", "max", "positions", "tokens", "blocks", "num", "size")


def places(state):
    """(settings, name) of everything that the task and the model are told."""
    for group in ("task", "model"):
        values = state["cfg"][group]
        values = vars(values) if isinstance(values, argparse.Namespace) else values
        yield from ((values, name) for name in sorted(values) if not any(part in name for part in SIZES))


def lengths(path, data):
    energy = load_energy(str(path), data)
    args = argparse.Namespace(prefix_length=None, sequence_length=None, sample_break_mode=None, energy_path=str(path), prefix="a")
    prefix, length, _ = joint_setup._lengths(args, energy)
    assert 0 <= prefix < length
    assert next_token._rest(args, energy, 2) >= 0


def test_settings_of_an_energy(text, energy, tmp_path):
    whole = torch.load(energy, weights_only=False)
    dictionary = Dictionary.load(str(text.data / "dict.txt"))
    data = argparse.Namespace(source_dictionary=dictionary, target_dictionary=dictionary, args=argparse.Namespace(data=str(text.data)))
    lengths(energy, data)
    path = tmp_path / "energy.pt"

    @settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def tried(drawn):
        state = copy.deepcopy(whole)
        for _ in range(drawn.draw(st.integers(1, 2))):
            values, name = drawn.draw(st.sampled_from(list(places(state))))
            values[name] = copy.deepcopy(drawn.draw(st.sampled_from(VALUES)))
        torch.save(state, path)
        with limits():
            read_or_refuse(lengths, path, data)

    tried()
