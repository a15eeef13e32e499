"""How likely data is under a model's softmax q, and under q · μ^β / Z, the model with its own energy (Eq. 4).

Three numbers tell whether an energy is worth anything, in this order:

* the Donsker-Varadhan (DV) bound E_data[log μ] − log E_q[μ] ≤ KL(data ‖ q): at or below zero the energy has learnt nothing;
* the joint NLL −log q − β log μ + log Z_β, its temperature β fitted on validation data and applied to test data;
* the NLL of q alone, which β = 0 gives back: a joint NLL below it is earned by the energy.

All in nats. Z_β(source) is estimated from N samples of q per source, from below and above (`ebm.partition`), so the joint
NLL comes as a pair of bounds, in expectation. "Shared" means one normaliser for all sources, as E-ARM's batch normaliser has.
"""
from __future__ import annotations

import math
from typing import Iterable, List, NamedTuple

import torch
from torch import Tensor

from fairseq_earm.ebm.partition import log_partition
from fairseq_earm.sampling.scoring import score_sequences

# Temperatures at which the joint NLL is tried, and how far each of two further rounds narrows the search.
LARGEST_TEMPERATURE = 4.0
GRID = 41


class CorpusScores(NamedTuple):
    """What a model says about S sentence pairs and about N of its own translations of each, in the data's order.

    Attributes:
        log_q: (S,) log-probability of each target under the softmax.
        lengths: (S,) tokens of each target, end-of-sentence included.
        log_mu: (S,) log μ of each target.
        sample_log_mu: (S, N) log μ of the samples.
        samples: S lists of N token lists, end-of-sentence left out.
        truncated: (S, N) True where a sample reached the maximum length.
    """

    log_q: Tensor
    lengths: Tensor
    log_mu: Tensor
    sample_log_mu: Tensor
    samples: List[List[List[int]]]
    truncated: Tensor


class DvBound(NamedTuple):
    """DV bounds, scalars: against one normaliser for all sources, and against each source's own (biased upwards by few samples)."""

    shared: Tensor
    per_source: Tensor


class JointNll(NamedTuple):
    """Mean joint NLL per sentence, scalars: bounds with each source's own normaliser, and with one shared normaliser."""

    lower: Tensor
    upper: Tensor
    shared: Tensor


def log_mean_exp(values: Tensor, dim: int) -> Tensor:
    """Log of the mean of exp(values) along `dim`."""
    return values.logsumexp(dim) - math.log(values.size(dim))


def dv_bound(log_mu: Tensor, sample_log_mu: Tensor) -> DvBound:
    """E_data[log μ] − log E_q[μ].

    Args:
        log_mu: (S,) of the data.
        sample_log_mu: (S, N) of samples for the same sources.
    """
    log_mu, sample_log_mu = log_mu.double(), sample_log_mu.double()
    shared = log_mu.mean() - log_mean_exp(sample_log_mu.flatten(), 0)
    per_source = (log_mu - log_mean_exp(sample_log_mu, 1)).mean()
    return DvBound(shared, per_source)


def joint_nll(log_q: Tensor, log_mu: Tensor, sample_log_mu: Tensor, temperature: float) -> JointNll:
    """Mean of −log q − β log μ + log Z_β over sentences.

    Args:
        log_q, log_mu: (S,) of the data.
        sample_log_mu: (S, N) of samples for the same sources.
        temperature: β; 0 gives the NLL of q.
    """
    unnormalized = (-log_q.double() - temperature * log_mu.double()).mean()
    scaled = temperature * sample_log_mu.double()
    bounds = log_partition(scaled)
    return JointNll(
        unnormalized + bounds.lower.mean(),
        unnormalized + bounds.upper.mean(),
        unnormalized + log_mean_exp(scaled.flatten(), 0),
    )


def fit_temperature(log_q: Tensor, log_mu: Tensor, sample_log_mu: Tensor, *, shared: bool = False) -> float:
    """The β ≥ 0 that minimises the joint NLL, by a grid that narrows twice around its best point.

    The upper bound is minimised, so that a β whose normaliser is badly estimated is not taken for a good one. β = 0 is on
    the grid: an energy that does not help is switched off.

    Args:
        log_q, log_mu: (S,) of the validation data.
        sample_log_mu: (S, N) of samples for the same sources.
        shared: fit for the shared normaliser instead.
    """

    def cost(temperature: float) -> float:
        nll = joint_nll(log_q, log_mu, sample_log_mu, temperature)
        return float(nll.shared if shared else nll.upper)

    low, high = 0.0, LARGEST_TEMPERATURE
    for _ in range(3):
        grid = torch.linspace(low, high, GRID, dtype=torch.float64).tolist()
        best = min(grid, key=cost)
        width = (high - low) / (GRID - 1)
        low, high = max(0.0, best - width), min(LARGEST_TEMPERATURE, best + width)
    return min((0.0, best), key=cost)


def summarize(valid: CorpusScores, test: CorpusScores) -> dict:
    """All of the above as plain numbers: temperatures fitted on `valid`, everything else measured on `test`.

    A negative `joint_gain` means that the fitted energy made the test data less likely.
    """
    fit = [valid.log_q, valid.log_mu, valid.sample_log_mu]
    data = [test.log_q, test.log_mu, test.sample_log_mu]
    temperature, shared_temperature = fit_temperature(*fit), fit_temperature(*fit, shared=True)
    joint = joint_nll(*data, temperature)
    dv = dv_bound(test.log_mu, test.sample_log_mu)
    nll = -float(test.log_q.double().mean())
    return {
        "valid_nll": -float(valid.log_q.double().mean()),
        "valid_joint_nll": float(joint_nll(*fit, temperature).upper),
        "nll": nll,
        "nll_per_token": -float(test.log_q.double().sum() / test.lengths.sum()),
        "dv": float(dv.shared),
        "dv_per_source": float(dv.per_source),
        "valid_dv": float(dv_bound(valid.log_mu, valid.sample_log_mu).shared),
        "temperature": temperature,
        "joint_nll": float(joint.upper),
        "joint_nll_lower": float(joint.lower),
        "joint_gain": nll - float(joint.upper),
        "shared_temperature": shared_temperature,
        "joint_nll_shared": float(joint_nll(*data, shared_temperature).shared),
        "truncated": float(test.truncated.double().mean()),
    }


@torch.no_grad()
def score_corpus(
    model, batches: Iterable[dict], sampler, *, samples: int, energy_step: str = "last", seed: int = 1,
) -> CorpusScores:
    """Score a corpus and draw translations of it.

    Args:
        model: an encoder-decoder model in eval mode.
        batches: fairseq batches of sentence pairs, right-padded targets.
        sampler: called `sampler(model, net_input, negatives=N) -> Samples`.
        samples: N per source.
        energy_step: "last" or "post" (see `sampling.scoring`).
        seed: of the samples; the global random state is left as it is.
    """
    ids, columns, texts = [], [], []
    for number, batch in enumerate(batches):
        if not batch:
            continue
        ids.append(batch["id"].cpu())
        # Samplers draw from a stream seeded by the global state and restore that: unchanged, all batches would draw alike.
        with torch.random.fork_rng():
            torch.manual_seed(seed * 1_000_003 + number)
            drawn = sampler(model, batch["net_input"], negatives=samples)
        columns.append(_score_batch(model, batch, drawn, samples, energy_step))
        texts += _token_lists(drawn, samples)
    order = torch.cat(ids).argsort()
    log_q, lengths, log_mu, sample_log_mu, truncated = [torch.cat(column)[order] for column in zip(*columns)]
    return CorpusScores(log_q, lengths, log_mu, sample_log_mu, [texts[i] for i in order.tolist()], truncated)


def _score_batch(model, batch: dict, drawn, samples: int, energy_step: str) -> tuple:
    """(log q, lengths, log μ) of a batch's B targets, (B, N) log μ of its samples and whether they were cut."""
    target, mask = batch["target"], batch["target"].ne(model.decoder.dictionary.pad())
    inputs = batch["net_input"]
    data = score_sequences(model, inputs, target, mask, energy_step=energy_step)
    own = score_sequences(model, inputs, drawn.tokens, drawn.mask, sources=drawn.sources, energy_step=energy_step)
    shape = (target.size(0), samples)
    columns = (data.log_q.sum(1), mask.sum(1), data.log_mu, own.log_mu.view(shape), drawn.truncated.view(shape))
    return tuple(column.cpu() for column in columns)


def _token_lists(drawn, samples: int) -> List[List[List[int]]]:
    """The samples of each source as token lists; a cut sample keeps its last token, which is no end-of-sentence."""
    lengths = (drawn.lengths - (~drawn.truncated).long()).tolist()
    rows = [row[:length] for row, length in zip(drawn.tokens.tolist(), lengths)]
    return [rows[i:i + samples] for i in range(0, len(rows), samples)]
