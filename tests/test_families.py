"""What holds for every family of models: exact gradients, exact draws, and the stock criterion where E-ARM is off."""
from __future__ import annotations

from collections import Counter

import pytest
import torch
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.models import FairseqEncoderDecoderModel
from fairseq.models.transformer_align import TransformerAlignModel
from scipy.stats import chi2

from fairseq_earm.ebm import products
from fairseq_earm.ebm.products import bf16_helps
from fairseq_earm.errors import UsageError
from fairseq_earm.sampling.heads import check_projection
from fairseq_earm.sampling.samples import Samples
from fairseq_earm.sampling.scheduled import Predictions, scheduled_sampling
from tests.criterions.stubs import Task
from tests.families import FAMILIES
from tests.oracles.tabular import exact_objective


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]()


def gradient(loss, model):
    """All parameters' gradient in one vector."""
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(found, model.parameters())])


def exact_samples(family) -> Samples:
    """Negatives that are distributed exactly as the model draws them, as many for each row of the batch."""
    sequences, sources = family.network.exact_batch(family.parts)
    pad, width = family.dictionary.pad(), max(map(len, sequences))
    tokens = torch.tensor([[*sequence, *[pad] * (width - len(sequence))] for sequence in sequences])
    steps = torch.arange(width) < torch.tensor([[len(sequence)] for sequence in sequences])
    return Samples(tokens, steps, torch.zeros(tokens.shape), torch.zeros_like(sources, dtype=torch.bool), sources)


@pytest.mark.parametrize("normalizer", ["batch", "source"])
@pytest.mark.parametrize("recent_tokens", [-1, 0, 1])
@pytest.mark.parametrize("energy_steps", ["all", "last", "post"])
@pytest.mark.parametrize("reduction", ["none", "full"])
def test_the_gradient_is_that_of_the_exact_objective(family, reduction, energy_steps, recent_tokens, normalizer):
    if energy_steps not in family.steps or normalizer not in family.normalizers:
        pytest.skip("this family has no such steps or sources")
    weight, settings = 0.7, {"recent_tokens": recent_tokens, "normalizer": normalizer}
    criterion = family.criterion(
        earm_weight=weight, earm_negatives=2, earm_energy_steps=energy_steps, earm_variance_reduction=reduction,
        **{f"earm_{key}": value for key, value in settings.items()},
    )
    samples = exact_samples(family)
    criterion.family.draw = lambda model, sample, negatives: samples
    loss = criterion(family.model, family.sample)[0]
    exact = exact_objective(family.network, family.data, range(len(family.data)), energy_steps=energy_steps, **settings)
    log_probs = family.model(**family.sample["net_input"])[0].log_softmax(-1)
    target = family.sample["target"]
    kept = target.ne(family.dictionary.pad())
    nll = -log_probs.gather(-1, target.masked_fill(~kept, 0).unsqueeze(-1)).squeeze(-1)[kept].sum()
    expected, got = gradient(nll + weight * exact, family.model), gradient(loss, family.model)
    assert expected.norm() > 0.1
    assert (got - expected).norm() < 1e-6 * expected.norm()  # fairseq takes the softmax of attention in single precision


@pytest.mark.parametrize("name", FAMILIES)
def test_draws_are_the_models_own(name):
    family = FAMILIES[name](**({"rounded": False} if "pixel" in name else {}))
    criterion = family.criterion()
    torch.manual_seed(3)
    draws = 400
    samples = criterion.family.draw(family.model, family.sample, draws)
    assert family.model.training
    assert samples.sources.tolist() == [row for row in range(len(family.data)) for _ in range(draws)]
    statistic, freedom = 0.0, 0
    for source in range(len(family.data)):
        rows = (samples.sources == source).nonzero().flatten().tolist()
        drawn = [tuple(samples.tokens[row][samples.mask[row]].tolist()) for row in rows]
        drawn = [sequence[: family.network.length] for sequence in drawn]
        for row, sequence in list(zip(rows, drawn))[:5]:
            exact = family.network.log_q(source, sequence).item()
            assert samples.log_q[row][samples.mask[row]][: len(sequence)].sum().item() == pytest.approx(exact, abs=1e-6)
        counts = Counter(drawn)
        for sequence in family.network.complete_sequences():
            expected = draws * family.network.log_q(source, sequence).exp().item()
            statistic += (counts[sequence] - expected) ** 2 / expected
        freedom += len(family.network.complete_sequences()) - 1
    assert statistic < chi2.ppf(0.999, freedom)


@pytest.mark.parametrize("off", [{"earm_weight": 0.0}, {"earm_start_epoch": 2}, "eval"])
def test_where_earm_is_off_it_is_the_stock_criterion(family, off):
    family.model.train(off != "eval")
    task = Task(family.dictionary)
    for stock, flags in (
        (CrossEntropyCriterion(task, False), {}),
        (LabelSmoothedCrossEntropyCriterion(task, False, 0.1), {"label_smoothing": 0.1}),
    ):
        ours = family.criterion(**({} if off == "eval" else off), **flags)
        ours.family.draw = None
        loss, size, log = ours(family.model, family.sample)
        expected_loss, expected_size, expected_log = stock(family.model, family.sample)
        assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-12) and size == expected_size
        assert log["ntokens"] == expected_log["ntokens"]
        assert torch.allclose(gradient(loss, family.model), gradient(expected_loss, family.model), rtol=1e-10, atol=1e-12)


ROWS = ["encoder-decoder", "language model", "transformer_xl"]


@pytest.mark.parametrize("flags", [{}, {"earm_control": True}, {"earm_weight": 0.0}, {"earm_energy_steps": "last"}, "eval"], ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_holding_few_logits_at_once_changes_nothing(name, flags):
    family = FAMILIES[name](rounded=False)
    family.model.train(flags != "eval")
    flags = {"label_smoothing": 0.1, "report_accuracy": True, **({} if flags == "eval" else flags)}
    samples = family.criterion().family.draw(family.model, family.sample, 3)
    found = {}
    for rows in (0, 1, 4):
        criterion = family.criterion(earm_loss_rows=rows, earm_negatives=3, **flags)
        criterion.family.draw = lambda model, sample, negatives: samples
        loss, size, log = criterion(family.model, family.sample)
        seconds = {key: value for key, value in log.items() if key != "earm_sampling_seconds"}
        found[rows] = {"size": size, **{key: float(value) for key, value in seconds.items()}}, gradient(loss, family.model)
    for rows in (1, 4):  # the stock criterion takes its softmax in single precision
        assert found[rows][0] == pytest.approx(found[0][0], rel=3e-7)
        assert (found[rows][1] - found[0][1]).norm() < 1e-6 * found[0][1].norm()


def test_models_that_do_not_hand_out_their_states_are_refused(family, monkeypatch):
    if not hasattr(family.model.decoder, "output_projection"):
        with pytest.raises(UsageError, match="--earm-loss-rows 4: no effect"):
            family.criterion(earm_loss_rows=4)
        return
    criterion = family.criterion(earm_loss_rows=4, earm_weight=0.0)
    monkeypatch.setattr(family.model.decoder, "adaptive_softmax", torch.nn.Identity(), raising=False)
    with pytest.raises(UsageError, match="--earm-loss-rows: .* leave the flag out"):
        criterion(family.model, family.sample)


# The first is what multilingual_transformer is made of.
@pytest.mark.parametrize("kind", [FairseqEncoderDecoderModel, TransformerAlignModel])
def test_models_that_do_not_ask_their_decoder_for_its_states_are_refused(kind):
    model = FAMILIES["encoder-decoder"](rounded=False).model
    check_projection(model)
    model.__class__ = kind
    with pytest.raises(UsageError, match=f"--earm-loss-rows: {kind.__name__} does not hand out its states"):
        check_projection(model)


@pytest.mark.parametrize("name, attribute, says", [
    ("FullyShardedDataParallel", None, "--ddp-backend fully_sharded"),
    ("DistributedDataParallel", "find_unused_parameters", "--find-unused-parameters"),
])
def test_wrappers_that_do_not_know_of_the_projection_are_refused(name, attribute, says):
    family = FAMILIES["encoder-decoder"](rounded=False)
    wrapper = type(name, (torch.nn.Module,), {"decoder": family.model.decoder, attribute or "plain": True})()
    tied = family.model.decoder.output_projection.weight
    assert family.model.decoder.embed_tokens.weight is not tied
    with pytest.raises(UsageError, match=says):
        check_projection(wrapper)
    if attribute:
        family.model.decoder.embed_tokens.weight = tied
        check_projection(wrapper)


def test_flags_without_effect_are_refused(family):
    if "post" in family.steps:
        assert family.criterion(earm_max_len_b=3).family.sampler.max_len_b == 3
    else:
        with pytest.raises(UsageError, match="--earm-max-len-b 3: no effect"):
            family.criterion(earm_max_len_b=3)


def test_one_update_draws_the_same_negatives_whenever_it_is_done(family):
    criterion = family.criterion(earm_negatives=3)
    found = []
    for _ in range(2):
        torch.manual_seed(7)
        found.append(criterion.family.draw(family.model, family.sample, 3))
        assert torch.equal(torch.rand(1), torch.manual_seed(7) and torch.rand(1))
    assert torch.equal(found[0].tokens, found[1].tokens)


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize("name", ["encoder-decoder", "language model", "transformer_xl"])
def test_under_scheduled_sampling_energies_stay_those_of_the_data(name, control):
    family = FAMILIES[name](rounded=False)
    criterion = family.criterion(earm_weight=0.5, earm_control=control)
    samples = criterion.family.draw(family.model, family.sample, 3)
    criterion.family.draw = lambda model, sample, negatives: samples
    stock = LabelSmoothedCrossEntropyCriterion(Task(family.dictionary), False, 0.0)

    def energies_part():
        whole, cross_entropy = (c(family.model, family.sample)[0] for c in (criterion, stock))
        return gradient(whole, family.model) - gradient(cross_entropy, family.model), cross_entropy.item()

    teacher_forced, before = energies_part()
    with scheduled_sampling(family.model, 0.0, Predictions("argmax")):
        scheduled, after = energies_part()
    assert before != after
    assert (scheduled - teacher_forced).norm() < 1e-5 * teacher_forced.norm()


@pytest.mark.skipif(not bf16_helps(torch.device("cpu")), reason="this processor does not multiply in bfloat16")
@pytest.mark.parametrize("name", ["encoder-decoder", "language model"])
def test_negatives_in_bfloat16_come_from_nearly_the_same_distribution(name, monkeypatch):
    family = FAMILIES[name](rounded=False)
    family.model.float()
    criterions = [family.criterion(earm_negatives=200, earm_sampling_bf16=bf16) for bf16 in (False, True)]
    monkeypatch.setattr(products, "LEAST", 1)
    drawn = []
    monkeypatch.setattr("fairseq_earm.sampling.decoding.LEAST", 1)
    for criterion in criterions:
        criterion.family.check(family.model)
        torch.manual_seed(1)
        samples = criterion.family.draw(family.model, family.sample, 200)
        assert criterion.family.sampler.bf16 is criterion.cfg.earm_sampling_bf16
        drawn.append(samples)
    exact, quick = (
        {(int(source), *row[:length].tolist()): log_q.item() for source, row, length, log_q in zip(
            samples.sources, samples.tokens, samples.lengths, samples.log_q.sum(1)
        )} for samples in drawn
    )
    common = [(exact[row], quick[row]) for row in exact if row in quick]
    assert len(common) > 1 and any(a != b for a, b in common)
    assert max(abs(a - b) for a, b in common) < 0.3


def test_bfloat16_is_refused_where_nothing_would_come_of_it():
    family = FAMILIES["encoder-decoder"](rounded=False)
    criterion = family.criterion(earm_sampling_bf16=True)
    with pytest.raises(UsageError, match="another precision than float32"):
        criterion.family.check(family.model)
    with pytest.raises(UsageError, match="no layer has a matrix of 131,072 elements"):
        criterion.family.check(family.model.float())
    family.model.decoder.layers[0].fc1.register_forward_hook(lambda *_: None)
    with pytest.raises(UsageError, match="--earm-sampling-bf16: TransformerDecoderBase, as it is set up here"):
        criterion.family.check(family.model)
    with pytest.raises(UsageError, match="earm-sampling-bf16"):
        FAMILIES["pixel_cnn"]().criterion(earm_sampling_bf16=True)
