"""The criterion against the stock one, against an independent computation of the loss, and what it logs."""
from __future__ import annotations

import math

import pytest
import torch
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.logging import metrics

from fairseq_earm.criterions.earm_cross_entropy import EarmCrossEntropyCriterion
from fairseq_earm.sampling.heads import LogitHead, ProjectedHead
from tests.criterions.stubs import NEGATIVES, FixedSampler, batch, build, config
from tests.tiny_model import tiny_model


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("extra", [{}, {"label_smoothing": 0.1}, {"ignore_prefix_size": 1, "report_accuracy": True}, {"sentence_avg": True}])
@pytest.mark.parametrize("off", [{"earm_weight": 0.0}, {"earm_start_epoch": 2}, {"earm_start_update": 5}, "eval"])
def test_where_earm_is_off_it_is_the_stock_criterion(off, extra):
    model = tiny_model(dropout=0.2)
    model.train(off != "eval")
    criterion = build(model, **{**({} if off == "eval" else off), **extra})
    criterion.family.sampler = None
    stock_flags = {key: extra.get(key, default) for key, default in
                   [("label_smoothing", 0.0), ("ignore_prefix_size", 0), ("report_accuracy", False)]}
    stock = LabelSmoothedCrossEntropyCriterion(criterion.task, extra.get("sentence_avg", False), **stock_flags)
    sample = batch(model)
    torch.manual_seed(1)
    loss, size, log = criterion(model, sample)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    expected_loss, expected_size, expected_log = stock(model, sample)
    assert torch.equal(after, torch.get_rng_state())
    assert loss.item() == expected_loss.item() and size == expected_size
    assert {key: log[key] for key in expected_log} == expected_log
    ours, theirs = gradients(model, loss), gradients(model, expected_loss)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def numbers(model, sample, source, sequence):
    """[(lse, target logit, mean logit)] per step by one decoder pass per prefix, and the lse one step after the end."""
    eos = model.decoder.dictionary.eos()
    one = {k: v[source : source + 1] for k, v in sample["net_input"].items() if k != "prev_output_tokens"}
    encoder_out = model.encoder(**one)
    steps = []
    for k in range(len(sequence) + 1):
        logits = model.decoder(torch.tensor([[eos, *sequence[:k]]]), encoder_out=encoder_out)[0][0, -1]
        target = logits[sequence[k]] if k < len(sequence) else None
        steps.append((logits.logsumexp(0), target, logits.sum(), logits.numel()))
    return steps


def independent_loss(
    model, sample, *, m, steps, normalizer, epsilon, prefix, weight, smooth_history=False, rao_blackwell=False,
    baseline=False,
):
    """Cross-entropy + λ E-ARM, written down from the paper step by step, no tensor of more than one row."""
    pad = model.decoder.dictionary.pad()
    data = [(i, [t for t in row if t != pad]) for i, row in enumerate(sample["target"].tolist())]
    model_rows = [(source, list(sequence)) for sequence, source, _ in NEGATIVES]

    def terms(source, sequence, smooth):
        """[(history, φ, lse)] of the steps that carry energy, keyed by step."""
        found = numbers(model, sample, source, sequence)
        nll = [lse - target for lse, target, _, _ in found[:-1]]
        each = epsilon / (found[0][3] - 1)
        smoothed = [(1 - epsilon - each) * n + each * (v * lse - total) for n, (lse, _, total, v) in zip(nll, found)]
        past = smoothed if smooth else nll
        every = {}
        for k in range(prefix, len(sequence) + (steps == "post")):
            history = sum(past[max(prefix, 0 if m < 0 else k - m) : k], torch.zeros(()))
            phi = -found[k][1] if k < len(sequence) else -found[k][0]
            every[k] = (history, phi, found[k][0])
        if steps != "all":
            every = {0: every[max(every)]}
        return every, nll[prefix:], smoothed[prefix:]

    positives = [(i, *terms(i, sequence, smooth_history)) for i, sequence in data]
    negatives = [(i, *terms(i, sequence, False)[:2]) for i, sequence in model_rows]
    loss = sum(sum(smoothed) for _, _, _, smoothed in positives)
    for i, every, _, _ in positives:
        for k, (history, phi, _) in every.items():
            peers = [n for j, n, _ in negatives if k in n and (normalizer == "batch" or i == j)]
            if not peers:
                continue
            mean = torch.stack([n[k][2] for n in peers]).exp().mean().detach()
            phase = sum(
                (n[k][2].exp() / mean).detach() * (n[k][0] + (-n[k][2] if rao_blackwell else n[k][1])) for n in peers
            ) / len(peers)
            loss = loss + weight * (history + phi - phase)
    if baseline:
        loss = loss + weight * independent_baseline(negatives, positives, m, steps, normalizer, prefix)
    return loss


def independent_baseline(negatives, positives, m, steps, normalizer, prefix):
    """Σ b · (NLL − its value) over the tokens that were drawn, b counted row by row."""
    lengths = {i: prefix + len(nll) for i, _, nll, _ in positives}
    total, share = 0.0, len(positives) / len(negatives)
    for j, _, nll in negatives:
        group = [i for i in lengths if normalizer == "batch" or i == j]
        peers = [prefix + len(other) for i, _, other in negatives if i in group]
        for place, each in enumerate(nll):
            l = prefix + place
            later = range(l + 1, max([l + 1, *lengths.values()]) if m < 0 else l + m + 1)
            if steps == "all":
                b = sum(sum(lengths[i] > k for i in group) / sum(length > l for length in peers) for k in later)
            else:
                ends = [length - (steps == "last") for length in lengths.values()]  # counted from 0, as l is
                says = [end for end, length in zip(ends, lengths.values()) if length > l]
                within = [end for end in says if l < end <= (l + m if m >= 0 else end)]
                b = share * len(within) / len(says) if says else 0.0
            total = total + b * (each - each.detach())
    return total


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"earm_recent_tokens": 0, "earm_weight": 0.3},
        {"earm_recent_tokens": -1, "label_smoothing": 0.1},
        {"label_smoothing": 0.1, "earm_smooth_history": True},
        {"earm_energy_steps": "last", "earm_recent_tokens": 0},
        {"earm_energy_steps": "last", "earm_recent_tokens": 2},
        {"earm_energy_steps": "post", "earm_recent_tokens": 1, "label_smoothing": 0.1},
        {"earm_normalizer": "source", "earm_negatives": 2},
        {"earm_variance_reduction": "none"},
        {"earm_variance_reduction": "rao-blackwell"},
        {"earm_variance_reduction": "full", "earm_recent_tokens": -1},
        {"earm_variance_reduction": "none", "earm_recent_tokens": -1, "earm_normalizer": "source", "earm_negatives": 2},
        {"ignore_prefix_size": -1},
        {"ignore_prefix_size": 1},
        {"ignore_prefix_size": 1, "earm_energy_steps": "post", "earm_recent_tokens": -1},
    ],
)
@pytest.mark.parametrize("loss_rows", [0, 2])
def test_loss_and_gradient_are_the_papers(flags, loss_rows):
    model = tiny_model().train()
    criterion = build(model, earm_loss_rows=loss_rows, **flags)
    criterion.family.sampler = FixedSampler(model, NEGATIVES)
    sample = batch(model)
    loss, _, log = criterion(model, sample)
    reduction = flags.get("earm_variance_reduction", "full")
    expected = independent_loss(
        model, sample,
        m=flags.get("earm_recent_tokens", 2), steps=flags.get("earm_energy_steps", "all"),
        normalizer=flags.get("earm_normalizer", "batch"), epsilon=flags.get("label_smoothing", 0.0),
        prefix=max(flags.get("ignore_prefix_size", 0), 0), weight=flags.get("earm_weight", config().earm_weight),
        smooth_history=flags.get("earm_smooth_history", False), baseline=reduction == "full",
        rao_blackwell=reduction != "none" and "earm_energy_steps" not in flags,
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    ours, theirs = gradients(model, loss), gradients(model, expected)
    for name in theirs:
        assert torch.allclose(ours[name], theirs[name], rtol=1e-7, atol=1e-10), name


@pytest.mark.parametrize("energy_steps", ["all", "last", "post"])
def test_a_target_that_is_given_whole_has_no_part_in_the_energies(energy_steps):
    """Neither as data nor by what was drawn after it, which no data stands against."""
    model, losses = tiny_model().train(), []
    for negatives in (NEGATIVES, [each for each in NEGATIVES if each[1] != 2]):
        criterion = build(model, ignore_prefix_size=2, earm_energy_steps=energy_steps)
        criterion.family.sampler = FixedSampler(model, negatives)
        loss, _, log = criterion(model, batch(model))
        losses.append((loss.item(), log["earm_steps"].item(), log["earm_negative_tokens"].item()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert losses[0][1] == (2 if energy_steps != "all" else losses[0][1]) > 0


def test_control_is_cross_entropy_and_nll_terms_and_samples_nothing():
    model = tiny_model().train()
    criterion = build(model, earm_control=True, earm_weight=0.5, earm_recent_tokens=1)
    criterion.family.sampler = None
    sample = batch(model)
    loss, _, log = criterion(model, sample)
    expected = 0.0
    for i, row in enumerate(sample["target"].tolist()):
        sequence = [t for t in row if t != model.decoder.dictionary.pad()]
        nll = [(lse - target).item() for lse, target, _, _ in numbers(model, sample, i, sequence)[:-1]]
        expected += sum(nll) + 0.5 * (sum(nll) + sum(nll[:-1]))
    assert loss.item() == pytest.approx(expected)
    assert log["earm_negatives"] == 0 and log["earm_batches"] == 1


def test_encoder_and_wrapper_run_once_and_both_decoder_passes_in_training_mode():
    model = tiny_model(dropout=0.5).train()
    criterion = build(model)
    criterion.family.sampler = FixedSampler(model, NEGATIVES)
    calls = []
    for name, module in (("model", model), ("encoder", model.encoder), ("decoder", model.decoder)):
        module.register_forward_hook(lambda module, *rest, name=name: calls.append((name, module.training)))
    criterion(model, batch(model))
    assert sorted(calls) == [("decoder", True), ("decoder", True), ("encoder", True), ("model", True)]
    assert not model.encoder._forward_hooks or len(model.encoder._forward_hooks) == 1


@pytest.mark.parametrize("flags, times", [
    ({}, 2), ({"label_smoothing": 0.1, "earm_smooth_history": True}, 2), ({"earm_control": "likelihood"}, 1),
    ({"earm_dropout": "off"}, 3), ({"earm_weight": 0.0, "earm_loss_rows": 2}, 1),
])
def test_the_logits_of_each_pass_are_read_once(monkeypatch, flags, times):
    model, calls = tiny_model().train(), []
    criterion = build(model, **flags)
    criterion.family.sampler = FixedSampler(model, NEGATIVES)
    for head in (LogitHead, ProjectedHead):
        read = head.statistics
        counted = lambda *args, read=read, **kwargs: calls.append(1) or read(*args, **kwargs)  # noqa: E731
        monkeypatch.setattr(head, "statistics", counted)
    criterion(model, batch(model))
    assert len(calls) == times


def test_hooks_are_gone_after_a_failure():
    model = tiny_model().train()
    criterion = build(model)
    criterion.family.sampler = FixedSampler(model, [((4, 2), 99, False)])
    with pytest.raises(IndexError):
        criterion(model, batch(model))
    assert not model.encoder._forward_hooks and not model.decoder._forward_hooks


def test_log_has_the_same_keys_in_every_update_and_sums_over_workers():
    model = tiny_model().train()
    outputs = []
    for flags in ({}, {"earm_weight": 0.0}, {"earm_control": True}):
        criterion = build(model, **flags)
        criterion.family.sampler = FixedSampler(model, NEGATIVES)
        outputs.append(criterion(model, batch(model))[2])
    assert outputs[0].keys() == outputs[1].keys() == outputs[2].keys()
    assert all(torch.is_tensor(v) and v.dim() == 0 for log in outputs for k, v in log.items() if k.startswith("earm_"))
    assert EarmCrossEntropyCriterion.logging_outputs_can_be_summed()
    one = outputs[0]
    summed = {key: value + value for key, value in one.items()}
    with metrics.aggregate() as apart:
        EarmCrossEntropyCriterion.reduce_metrics([one, one])
    with metrics.aggregate() as together:
        EarmCrossEntropyCriterion.reduce_metrics([summed])
    assert apart.get_smoothed_values() == together.get_smoothed_values()


def test_logged_figures_are_means_of_what_they_say():
    model = tiny_model().train()
    criterion = build(model, earm_energy_steps="last")
    criterion.family.sampler = FixedSampler(model, NEGATIVES)
    sample = batch(model)
    with metrics.aggregate() as logged:
        criterion.reduce_metrics([criterion(model, sample)[2]])
    pad = model.decoder.dictionary.pad()
    data = [numbers(model, sample, i, [t for t in row if t != pad])[-2][0].item() for i, row in enumerate(sample["target"].tolist())]
    own = torch.tensor([numbers(model, sample, source, sequence)[-2][0].item() for sequence, source, _ in NEGATIVES])
    values = logged.get_smoothed_values()
    weights = own.softmax(0)
    mean = sum(data) / len(data)
    log_normalizer = own.logsumexp(0).item() - math.log(len(own))
    assert values["earm_energy_data"] == pytest.approx(-mean, abs=2e-3)
    assert values["earm_energy_negatives"] == pytest.approx(-own.mean().item(), abs=2e-3)
    assert values["earm_energy_gap"] == pytest.approx(mean - own.mean().item(), abs=2e-3)
    assert values["earm_log_normalizer"] == pytest.approx(log_normalizer, abs=2e-3)
    assert values["earm_dv"] == pytest.approx(mean - log_normalizer, abs=2e-3)
    assert values["earm_ess"] == pytest.approx(1 / (weights**2).sum().item() / len(own), abs=2e-3)
    assert values["earm_max_weight"] == pytest.approx(weights.max().item() * len(own), abs=2e-2)
    assert values["earm_negative_length"] == pytest.approx(sum(len(s) for s, _, _ in NEGATIVES) / 6, abs=1e-2)
    assert values["earm_truncated"] == pytest.approx(2 / 6, abs=1e-3)
