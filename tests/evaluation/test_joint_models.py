"""Models with an energy against everything they can write."""
from __future__ import annotations

import math

import pytest
import torch

from fairseq_earm.evaluation.joint_models import (
    LanguageJoint, OwnLanguageEnergies, TranslationJoint, chunk_sizes, network_energies, own_energies,
)
from fairseq_earm.evaluation.residual import measure_sequence
from fairseq_earm.models.energy_transformer import BidirectionalEnergyTransformer, EnergyTransformerBitConfig
from fairseq_earm.sampling.ancestral import AncestralSampler
from fairseq_earm.sampling.scoring import score_sequences
from tests.oracles.residual import ListedJoint
from tests.tiny_language import ADAPTIVE, TIED, enumerate_continuations, tiny_language_model
from tests.tiny_model import enumerate_targets, tiny_batch, tiny_model

LONGEST, TARGET, SOURCE = 3, (5, 4, 2), 1
PAD = 1


@pytest.fixture(scope="module")
def base():
    return tiny_model(seed=3)


@pytest.fixture(scope="module")
def item(base):
    inputs = {key: value[SOURCE : SOURCE + 1] for key, value in tiny_batch(base, lengths=(3, 3)).items()}
    return {"net_input": inputs, "target": torch.tensor([TARGET])}


def own_energy(base, item, x):
    tokens = torch.tensor([x])
    return -score_sequences(base, item["net_input"], tokens, tokens.ne(PAD)).log_mu.item()


@pytest.fixture(scope="module")
def network(base):
    settings = EnergyTransformerBitConfig(
        encoder_layers=1, encoder_embed_dim=8, encoder_ffn_embed_dim=16, encoder_attention_heads=2, max_positions=16
    )
    torch.manual_seed(4)
    network = BidirectionalEnergyTransformer(settings, base.decoder.dictionary).double().eval()
    with torch.no_grad():
        network.energy_projection.weight.mul_(40)
    return network


def listed(base, item, energy):
    """Everything the sampler can draw: translations that end, and those cut at the longest length."""
    log_probs = enumerate_targets(base, item["net_input"], 0, LONGEST)
    return ListedJoint(log_probs, {x: energy(x) for x in log_probs})


def joint(base, energies, chunk=500):
    sampler = AncestralSampler(base.decoder.dictionary, max_len_a=0, max_len_b=LONGEST)
    return TranslationJoint(base, energies, sampler, chunk=chunk)


def check(model, exact, item):
    record = measure_sequence(model, item, index=3, samples=[10, 6000])
    assert math.fsum(record["base"]) == pytest.approx(exact.log_probs[TARGET], abs=1e-5)
    assert record["energy"] == pytest.approx(exact.energies[TARGET], abs=1e-5)
    assert record["log_z"][1] == pytest.approx([exact.log_z()] * 2, abs=0.07)  # its standard error is 0.02
    assert abs(exact.log_z() + exact.energies[TARGET]) > 0.1, "the joint model should differ from its base"


def test_a_model_with_an_adaptive_softmax_and_its_own_energies(item):
    base = tiny_model(words=3, seed=3, **ADAPTIVE)
    encoder_out = base.encoder(item["net_input"]["src_tokens"], src_lengths=item["net_input"]["src_lengths"])

    def energy(x):
        with torch.no_grad():
            features = base.decoder(torch.tensor([[2, *x[:-1]]]), encoder_out=encoder_out)[0][:, -1]
            return -base.decoder.adaptive_softmax.head(features).logsumexp(-1).item()

    check(joint(base, own_energies(base)), listed(base, item, energy), item)


def test_a_model_with_its_own_energies(base, item):
    check(joint(base, own_energies(base)), listed(base, item, lambda x: own_energy(base, item, x)), item)


def test_an_energy_network_reads_the_source_and_then_the_translation(base, item, network):
    source = item["net_input"]["src_tokens"][0].tolist()

    def energy(x):
        with torch.no_grad():
            return network(torch.tensor([[*source, *x]])).item()

    check(joint(base, network_energies(network, PAD, 0)), listed(base, item, energy), item)


def test_samples_depend_on_the_seed_alone_and_the_global_state_on_nothing(base, item):
    model = joint(base, own_energies(base), chunk=16)
    before = torch.get_rng_state()
    draws = [model.sampled_energies(item, 0, 40, seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0][:16], draws[0][16:32]), "each chunk draws its own samples"
    assert draws[0].shape == (40,)


@pytest.mark.parametrize("head", [{}, TIED], ids=["one softmax", "adaptive"])
def test_a_language_model_with_its_own_energies(head, monkeypatch):
    """Energies, log Z and every step of P(x | prefix) ∝ q(x | prefix) exp(lse at the last step), padding never drawn."""
    model = tiny_language_model(words=3, seed=11, **head)
    prefix, continuation = (4, 5), (5, 2, 4)

    def log_mu(x):
        read = torch.tensor([[2, *prefix, *x[:-1]]])
        with torch.no_grad():
            output = model.decoder(read)
            if not head:
                return output[0][0, -1].logsumexp(-1).item()
            return model.decoder.adaptive_softmax.head(output[0][:, -1]).logsumexp(-1).item()

    log_probs = enumerate_continuations(model, torch.tensor(prefix), 3)
    exact = ListedJoint(log_probs, {x: -log_mu(x) for x in log_probs})
    monkeypatch.setattr("fairseq_earm.evaluation.joint_models.MAX_LOGITS", 700)  # a few rows at a time
    joint = LanguageJoint(model, OwnLanguageEnergies(model), 2, chunk=3000)
    record = measure_sequence(joint, torch.tensor([*prefix, *continuation]), index=3, samples=[10, 6000], per_step=True)
    assert math.fsum(record["base"]) == pytest.approx(exact.log_probs[continuation], abs=1e-5)
    assert record["energy"] == pytest.approx(exact.energies[continuation], abs=1e-5)
    assert record["log_z"][1] == pytest.approx([exact.log_z()] * 2, abs=0.05)
    for step, bounds in enumerate(record["steps"], start=1):
        wanted = exact.step_log_prob(continuation, step)
        assert bounds == pytest.approx([wanted] * 2, abs=0.1 if step < 3 else 1e-5)
    moved = [abs(bounds[0] - base) for bounds, base in zip(record["steps"], record["base"])]
    assert max(moved) > 0.3, "the joint model should differ from its base"
    assert record["steps"][2] == pytest.approx([record["base"][2]] * 2, abs=1e-5), "the last token has no part in its own normaliser"


def test_translations_have_no_steps(base, item):
    with pytest.raises(ValueError, match="no estimate of their steps"):
        joint(base, own_energies(base)).sampled_energies(item, 1, 4, seed=1)
    with pytest.raises(ValueError, match="no last step"):
        joint(base, own_energies(base)).last_token(item)


def test_chunks_add_up():
    assert chunk_sizes(7, 3) == [3, 3, 1] and chunk_sizes(4, 4) == [4] and chunk_sizes(2, 9) == [2]
