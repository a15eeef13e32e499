"""Likelihoods against exact sums over a small space, and the glue against one sentence at a time."""
import argparse
import math

import pytest
import torch
from fairseq.data import Dictionary
from fairseq.models.transformer import TransformerModel, base_architecture

from fairseq_earm.evaluation.likelihood import (
    CorpusScores, dv_bound, fit_temperature, joint_nll, score_corpus, summarize,
)
from fairseq_earm.sampling.ancestral import AncestralSampler
from fairseq_earm.sampling.scoring import score_sequences

SOURCES, OUTCOMES, SAMPLES = 3, 6, 20_000


class Exact:
    """p(x | source) and q(x | source) over six outcomes, with log μ = half the true log-ratio, all tabulated in float64."""

    def __init__(self):
        torch.manual_seed(3)
        self.p = torch.rand(SOURCES, OUTCOMES, dtype=torch.float64).softmax(1)
        self.q = (torch.randn(SOURCES, OUTCOMES, dtype=torch.float64) * 0.7).softmax(1)
        # Each source has its own offset, which a normaliser per source must cancel.
        offset = torch.tensor([[0.3], [-0.4], [0.1]], dtype=torch.float64)
        self.log_mu = 0.5 * (self.p / self.q).log() + offset

    def nll(self, beta):
        log_z = (self.q * (beta * self.log_mu).exp()).sum(1, keepdim=True).log()
        return -(self.p * (self.q.log() + beta * self.log_mu - log_z)).sum(1).mean()

    def shared_nll(self, beta):
        log_z = (self.q * (beta * self.log_mu).exp()).sum(1).mean().log()
        return -(self.p * (self.q.log() + beta * self.log_mu)).sum(1).mean() + log_z

    def draw(self, samples=SAMPLES, data=4_000):
        """(log q, log μ) of data drawn from p, `data` per source, and (S·data, 1, N)-shaped log μ of shared samples."""
        x = torch.multinomial(self.p, data, replacement=True)
        y = torch.multinomial(self.q, samples, replacement=True)
        return self.q.log().gather(1, x), self.log_mu.gather(1, x), self.log_mu.gather(1, y)


@pytest.fixture
def exact():
    return Exact()


def means_of(log_q, log_mu):
    """Data of a source enters every quantity linearly: its mean stands for all of it."""
    return log_q.mean(1), log_mu.mean(1)


def expectations(exact):
    return (exact.p * exact.q.log()).sum(1), (exact.p * exact.log_mu).sum(1)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 2.0])
def test_joint_nll_is_the_exact_one_with_many_samples(exact, beta):
    _, _, samples = exact.draw()
    joint = joint_nll(*expectations(exact), samples, beta)
    assert joint.lower == pytest.approx(float(exact.nll(beta)), abs=0.02)
    assert joint.upper == pytest.approx(float(exact.nll(beta)), abs=0.02)
    assert joint.shared == pytest.approx(float(exact.shared_nll(beta)), abs=0.02)


def test_joint_nll_at_temperature_zero_is_the_nll(exact):
    log_q, log_mu, samples = exact.draw(samples=5, data=50)
    log_q, log_mu = means_of(log_q, log_mu)
    for value in joint_nll(log_q, log_mu, samples, 0.0):
        assert value == pytest.approx(float(-log_q.mean()), abs=1e-12)


def test_few_samples_bracket_the_exact_joint_nll_in_expectation(exact):
    few = [exact.draw(samples=8, data=1)[2] for _ in range(2_000)]
    joints = [joint_nll(*expectations(exact), samples, 2.0) for samples in few]
    lower = sum(j.lower for j in joints) / len(joints)
    upper = sum(j.upper for j in joints) / len(joints)
    # One standard error is about .003 here; the lower bound's bias is several times that.
    assert lower < exact.nll(2.0) - 0.01
    assert exact.nll(2.0) < upper < exact.nll(2.0) + 0.03


def test_dv_bound_is_the_exact_one_and_below_the_divergence(exact):
    _, _, samples = exact.draw()
    data = expectations(exact)[1]
    bound = dv_bound(data, samples)
    per_source = exact.log_mu - (exact.q * exact.log_mu.exp()).sum(1, keepdim=True).log()
    assert bound.per_source == pytest.approx(float((exact.p * per_source).sum(1).mean()), abs=0.02)
    shared = data.mean() - (exact.q * exact.log_mu.exp()).sum(1).mean().log()
    assert bound.shared == pytest.approx(float(shared), abs=0.02)
    divergence = (exact.p * (exact.p / exact.q).log()).sum(1).mean()
    assert 0 < bound.per_source < divergence


def test_perfect_energy_reaches_the_divergence(exact):
    log_ratio = (exact.p / exact.q).log()
    drawn = torch.multinomial(exact.q, SAMPLES, replacement=True)
    bound = dv_bound((exact.p * log_ratio).sum(1), log_ratio.gather(1, drawn))
    assert bound.per_source == pytest.approx(float((exact.p * log_ratio).sum(1).mean()), abs=0.02)


def test_fitted_temperature_is_the_exact_minimum(exact):
    # log μ is half the log-ratio, so that p = q · μ^2 / Z with a normaliser per source.
    _, _, samples = exact.draw()
    assert fit_temperature(*expectations(exact), samples) == pytest.approx(2.0, abs=0.15)
    shared = fit_temperature(*expectations(exact), samples, shared=True)
    grid = [i / 100 for i in range(401)]
    assert shared == pytest.approx(min(grid, key=lambda b: float(exact.shared_nll(b))), abs=0.15)


def test_harmful_energy_is_switched_off(exact):
    _, _, samples = exact.draw()
    log_q, log_mu = expectations(exact)
    assert fit_temperature(log_q, -log_mu, -samples) == 0.0


def test_summary_without_a_gain_has_the_nll_of_q():
    torch.manual_seed(0)
    nll, lengths, samples = torch.tensor([3.0, 5.0]), torch.tensor([2, 3]), torch.randn(2, 4)
    scores = CorpusScores(-nll, lengths, samples.amin(1) - 5, samples, [], torch.zeros(2, 4, dtype=torch.bool))
    summary = summarize(scores, scores)
    assert summary["temperature"] == 0 and summary["joint_gain"] == pytest.approx(0, abs=1e-12)
    assert summary["nll"] == pytest.approx(4.0) and summary["nll_per_token"] == pytest.approx(8 / 5)
    assert summary["dv"] < 0


def small_model(words=4):
    torch.manual_seed(1)
    dictionary = Dictionary()
    for i in range(words):
        dictionary.add_symbol(f"w{i}")
    sizes = {f"{side}_{name}": n for side in ("encoder", "decoder")
             for name, n in (("embed_dim", 16), ("ffn_embed_dim", 16), ("layers", 1), ("attention_heads", 2))}
    args = argparse.Namespace(**sizes, max_source_positions=16, max_target_positions=16)
    base_architecture(args)
    task = argparse.Namespace(source_dictionary=dictionary, target_dictionary=dictionary)
    return TransformerModel.build_model(args, task).eval(), dictionary


def corpus_batches(dictionary):
    """Two batches of two pairs each, out of the data's order, with different lengths."""
    eos, pad = dictionary.eos(), dictionary.pad()
    source = torch.tensor([[4, 5, eos], [6, 7, eos]])
    lengths = torch.tensor([3, 3])
    targets = [torch.tensor([[4, 5, 6, eos], [7, eos, pad, pad]]), torch.tensor([[5, eos], [6, eos]])]
    ids = [torch.tensor([2, 0]), torch.tensor([3, 1])]
    return [
        {"id": i, "net_input": {"src_tokens": source, "src_lengths": lengths}, "target": t} for i, t in zip(ids, targets)
    ]


@pytest.mark.parametrize("energy_step", ["last", "post"])
def test_score_corpus_agrees_with_single_sentences(energy_step):
    model, dictionary = small_model()
    batches = corpus_batches(dictionary)
    sampler = AncestralSampler(dictionary, max_len_a=0, max_len_b=6)
    scores = score_corpus(model, batches, sampler, samples=3, energy_step=energy_step)
    assert scores.lengths.tolist() == [2, 2, 4, 2]
    assert scores.sample_log_mu.shape == scores.truncated.shape == (4, 3)
    for batch in batches:
        for row, number in enumerate(batch["id"].tolist()):
            one = {k: v[row:row + 1] for k, v in batch["net_input"].items()}
            target = batch["target"][row:row + 1]
            target = target[:, target[0].ne(dictionary.pad())]
            alone = score_sequences(model, one, target, torch.ones_like(target, dtype=torch.bool), energy_step=energy_step)
            assert scores.log_q[number] == pytest.approx(float(alone.log_q.sum()), abs=1e-4)
            assert scores.log_mu[number] == pytest.approx(float(alone.log_mu), abs=1e-4)
            check_samples(model, dictionary, one, scores, number, energy_step)


def check_samples(model, dictionary, net_input, scores, number, energy_step):
    for column, words in enumerate(scores.samples[number]):
        ended = [] if scores.truncated[number, column] else [dictionary.eos()]
        tokens = torch.tensor([words + ended])
        alone = score_sequences(
            model, net_input, tokens, torch.ones_like(tokens, dtype=torch.bool), energy_step=energy_step
        )
        assert scores.sample_log_mu[number, column] == pytest.approx(float(alone.log_mu), abs=1e-4)
        assert dictionary.eos() not in words


def test_score_corpus_draws_anew_for_every_batch_and_leaves_the_random_state():
    model, dictionary = small_model()
    batch = corpus_batches(dictionary)[0]
    sampler = AncestralSampler(dictionary, max_len_a=0, max_len_b=8)
    before = torch.get_rng_state()
    later = {**batch, "id": batch["id"] + 10}
    scores = score_corpus(model, [batch, later], sampler, samples=16)
    again = score_corpus(model, [batch, later], sampler, samples=16)
    assert scores.samples[0] != scores.samples[2]
    assert scores.samples == again.samples
    assert torch.equal(before, torch.get_rng_state())
    assert math.isfinite(float(scores.sample_log_mu.sum()))
