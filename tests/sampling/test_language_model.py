"""Negatives of language models: how they are drawn, which steps of the data they stand against, how they are scored."""
from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from fairseq_earm.criterions.earm_cross_entropy import EarmCrossEntropyCriterion
from fairseq_earm.ebm.energy import token_energies
from fairseq_earm.errors import UsageError
from fairseq_earm.sampling.language_model import LanguageModelFamily
from fairseq_earm.sampling.scoring import full_logits
from tests.criterions.stubs import Task, config
from tests.sampling.test_samplers import chi_square
from tests.tiny_language import ADAPTIVE, TIED, enumerate_continuations, tiny_language_model
from tests.tiny_model import tiny_model

PAD, EOS = 1, 2
HEADS = {"adaptive": ADAPTIVE, "adaptive input, untied": {**TIED, "tie_adaptive_weights": False}, "tied": TIED}
# The third block is a short last one. The first two begin in the middle of a text, as blocks without break mode do.
BLOCKS = [(5, (4, 4, 2, 5, 5)), (4, (5, 2, 4, 4, 5)), (2, (5, 4))]


def batch(blocks=BLOCKS):
    """A batch of fairseq's language modelling: (the token before the block, the block)."""
    width = max(len(block) for _, block in blocks)
    target = torch.full((len(blocks), width), PAD)
    read = target.clone()
    for row, (before, block) in enumerate(blocks):
        target[row, : len(block)] = torch.tensor(block)
        read[row, : len(block)] = torch.tensor([before, *block][: len(block)])
    lengths = torch.tensor([len(block) for _, block in blocks])
    return {
        "net_input": {"src_tokens": read, "src_lengths": lengths}, "target": target, "ntokens": int(lengths.sum()),
        "nsentences": len(blocks),
    }


def family(model, length, **settings):
    return LanguageModelFamily(model.decoder.dictionary, length, **settings)


def logits_row_by_row(model, read):
    """(V,) logits after each of the tokens read, one pass for each, of one row."""
    with torch.no_grad():
        return [full_logits(model.decoder, model.decoder(torch.tensor([read[: k + 1]])))[0, -1] for k in range(len(read))]


@pytest.mark.parametrize("head", [None, *HEADS])
@pytest.mark.parametrize("prefix_length", [0, 2])
def test_draws_follow_the_softmax_behind_the_block_s_own_beginning(head, prefix_length):
    model = tiny_language_model(seed=2, words=3, **HEADS.get(head, {}))
    drawn = family(model, 2, prefix_length=prefix_length).draw(model, batch(), 4000)
    assert drawn.tokens.shape == (12000, 2) and not drawn.truncated.any()
    for row, (before, block) in enumerate(BLOCKS[:2]):
        mine = drawn.sources == row
        assert drawn.mask[mine].all()
        exact = enumerate_continuations(model, torch.tensor(block[:prefix_length]), 2, first=before)
        sequences = [tuple(tokens) for tokens in drawn.tokens[mine].tolist()]
        for sequence, log_q in list(zip(sequences, drawn.log_q[mine].sum(1).tolist()))[:200]:
            assert log_q == pytest.approx(exact[sequence], abs=1e-5)
        statistic, freedom = chi_square(Counter(sequences), {x: math.exp(p) for x, p in exact.items()}, len(sequences))
        assert statistic < freedom + 5 * math.sqrt(2 * freedom), (statistic, freedom)


@pytest.mark.parametrize("length, prefix_length, alive", [
    (3, 0, [3, 3, 2]), (3, 1, [3, 3, 1]), (50, 0, [5, 5, 2]), (50, 2, [3, 3, 0]), (2, 3, [2, 2, 0]), (9, 4, [1, 1, 0]), (9, 7, [0, 0, 0]),
])
def test_a_negative_is_as_long_as_the_data_it_stands_against(length, prefix_length, alive):
    model = tiny_language_model()
    drawn = family(model, length, prefix_length=prefix_length).draw(model, batch(), 2)
    assert drawn.sources.tolist() == [0, 0, 1, 1, 2, 2]
    assert drawn.lengths.tolist() == [n for n in alive for _ in range(2)]
    steps = torch.arange(drawn.mask.size(1))
    assert torch.equal(drawn.mask, steps < drawn.lengths.unsqueeze(1)), "from the first step on"
    assert (drawn.tokens[~drawn.mask] == PAD).all() and (drawn.tokens[drawn.mask] != PAD).all()
    assert (drawn.log_q[~drawn.mask] == 0).all() and (drawn.log_q[drawn.mask] < 0).all()


def test_sentences_end_by_end_of_sentence_and_blocks_do_not():
    model = tiny_language_model(seed=4)
    sentences = batch([(EOS, (4, 5, 5, EOS)), (EOS, (5, EOS)), (EOS, (EOS,))])
    drawn = family(model, 3, prefix_length=1, sentences=True).draw(model, sentences, 300)
    assert not drawn.mask[drawn.sources == 2].any(), "this sentence ends before its negatives begin"
    seen = Counter()
    for tokens, mask, cut, source in zip(drawn.tokens.tolist(), drawn.mask.tolist(), drawn.truncated.tolist(), drawn.sources.tolist()):
        said = [token for token, inside in zip(tokens, mask) if inside]
        if source < 2:
            assert EOS not in said[:-1] and cut == (said[-1] != EOS) and (not cut or len(said) == 3)
            seen[len(said), cut] += 1
        else:
            assert not cut
    assert set(seen) == {(1, False), (2, False), (3, False), (3, True)}
    # A negative may be longer than its row's sentence.
    assert drawn.lengths[drawn.sources == 1].max() == 3
    # Nothing is drawn behind the last end-of-sentence.
    endless = family(model, 500, prefix_length=1, sentences=True).draw(model, sentences, 30)
    assert endless.tokens.size(1) < 60 and not endless.truncated.any()
    running = family(model, 3, prefix_length=1).draw(model, batch(), 300)
    assert ((running.tokens == EOS) & running.mask)[:, :-1].any(), "in running text the block goes on after it"


@pytest.mark.parametrize("head", [None, "tied"])
@pytest.mark.parametrize("settings", [
    {"length": 3}, {"length": 3, "prefix_length": 2}, {"length": 50, "prefix_length": 1}, {"length": 4, "prefix_length": 1, "sentences": True},
], ids=str)
def test_energies_are_those_of_one_row_at_a_time(head, settings):
    """Logits of data and negatives, and the steps at which they are held against each other, prefix by prefix."""
    model = tiny_language_model(seed=5, words=3, **HEADS.get(head, {}))
    its, sample = family(model, **settings), batch()
    skipped = settings.get("prefix_length", 0)
    drawn = its.draw(model, sample, 2)
    passes = its.forward(model, sample, drawn)
    window = its.contrasted(passes.data.logits)
    targets, alive = its.contrasted(sample["target"]), its.contrasted(sample["target"].ne(PAD))
    assert passes.negatives.logits.shape[:2] == drawn.tokens.shape and passes.teacher_forced is passes.data
    checked = 0
    for row, source in enumerate(drawn.sources.tolist()):
        before, block = BLOCKS[source]
        negative = drawn.tokens[row][drawn.mask[row]].tolist()
        for tokens, logits, inside in (
            (negative, passes.negatives.logits[row], drawn.mask[row]),
            (block[skipped : skipped + settings["length"]], window[source], alive[source]),
        ):
            assert int(inside.sum()) == len(tokens)
            steps = logits_row_by_row(model, [before, *block[:skipped], *tokens])[skipped : skipped + len(tokens)]
            for step, exact in enumerate(steps):
                assert torch.allclose(logits[step], exact, atol=1e-9)
                checked += 1
        assert targets[source][alive[source]].tolist() == list(block[skipped : skipped + settings["length"]])
    assert checked > 12


def test_the_control_s_pass_is_the_data_s():
    model, sample = tiny_language_model(words=3, **TIED), batch()
    its = family(model, 3, prefix_length=1)
    alone, beside = its.forward(model, sample), its.forward(model, sample, its.draw(model, sample, 1))
    assert torch.allclose(alone.data.logits, beside.data.logits) and alone.negatives is None


def test_batches_of_one_update_draw_different_negatives_and_nothing_is_left_behind():
    """Two batches of sentences begin alike, and without dropout nothing but their words tells them apart."""
    model = tiny_language_model().train()
    its = family(model, 6, sentences=True)
    before = torch.get_rng_state()
    one, again, other = (
        its.draw(model, batch([(EOS, block)]), 8).tokens for block in ((4, 5, 5, EOS), (4, 5, 5, EOS), (4, 5, 4, EOS))
    )
    assert torch.equal(torch.get_rng_state(), before) and model.training
    assert torch.equal(one, again) and not torch.equal(one, other)


class FamilyTask(Task):
    """A task with language models."""

    def __init__(self, model, length, **settings):
        super().__init__(model.decoder.dictionary, positions=None)
        self.family = family(model, length, **settings)

    def build_model_family(self, cfg):
        return self.family


@pytest.mark.parametrize("flags", [{}, {"earm_energy_steps": "last"}, {"earm_control": True}, {"earm_normalizer_ema": 0.5}], ids=str)
def test_a_batch_that_ends_before_its_negatives_begin_is_cross_entropy(flags):
    model = tiny_language_model().train()
    sample = batch([(EOS, (4, 5)), (4, (5,))])
    criterion = EarmCrossEntropyCriterion(FamilyTask(model, 3, prefix_length=2), config(**flags))
    loss, _, log = criterion(model, sample)
    expected = EarmCrossEntropyCriterion(FamilyTask(model, 3), config(earm_weight=0.0))(model, sample)[0]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)  # stock losses are float32
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert all(math.isfinite(float(value)) for value in log.values()) and log["earm_loss"] == 0


def test_a_model_that_is_no_longer_finite_has_a_loss_that_shows_it():
    """Ending the command here would leave other workers waiting, and half precision could not lower its loss scale."""
    model = tiny_language_model().train()
    with torch.no_grad():
        next(model.decoder.layers[0].parameters()).fill_(math.nan)
    loss = EarmCrossEntropyCriterion(FamilyTask(model, 3), config())(model, batch())[0]
    assert loss.isnan()


def test_batches_that_are_filled_up_with_padding_are_taken():
    """As --pad-to-fixed-bsz does it: a row of nothing."""
    model, filled = tiny_language_model(), batch([*BLOCKS, (PAD, (PAD,))])
    drawn = family(model, 4).draw(model, filled, 1)
    assert drawn.lengths.tolist() == [4, 4, 2, 0]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("training", [False, True])
def test_full_logits_are_the_adaptive_softmax_s(head, training):
    model = tiny_language_model(seed=6, words=5, **{**HEADS[head], "adaptive_softmax_cutoff": "4,7", "adaptive_input_cutoff": "4,7"})
    decoder, read = model.train(training).decoder, torch.tensor([[2, 4, 8, 5], [5, 5, 7, 6]])
    output = decoder(read)
    logits, softmax = full_logits(decoder, output), decoder.adaptive_softmax
    assert logits.shape == (2, 4, len(decoder.dictionary)) and len(softmax.tail) == 2
    theirs = softmax.get_log_prob(output[0], None)
    assert torch.allclose(logits.log_softmax(-1), theirs, rtol=0, atol=1e-12)
    head_lse = softmax.head(output[0].contiguous()).view(2, 4, -1).logsumexp(-1)
    assert torch.allclose(logits.logsumexp(-1), head_lse, rtol=0, atol=1e-12)
    assert head_lse.std() > 0.1, "an offset that tells nothing would not be missed"

    target = torch.tensor([[4, 8, 5, 2], [5, 7, 6, 4]])
    mine = token_energies(logits, target).nll.sum()
    wanted = -theirs.gather(-1, target.unsqueeze(-1)).sum()
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in (mine, wanted)]
    for one, other in zip(*gradients):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, rtol=0, atol=1e-12)


def test_full_logits_of_half_precision_are_wide():
    model = tiny_language_model(words=3, **ADAPTIVE).to(torch.bfloat16)
    assert full_logits(model.decoder, model.decoder(torch.tensor([[2, 4, 5]]))).dtype == torch.float32


def test_other_logits_are_passed_through():
    model = tiny_language_model()
    output = model.decoder(torch.tensor([[2, 4, 5]]))
    assert full_logits(model.decoder, output) is output[0]


def test_models_that_cannot_serve_are_refused():
    model = tiny_language_model(max_positions=10)
    family(model, 10).check(model)
    family(model, 50).check(model)  # blocks are no longer than the model takes
    with pytest.raises(UsageError, match="--earm-negative-length 8: with --earm-prefix-length 3 .* 10 positions"):
        family(model, 8, prefix_length=3, sentences=True).check(model)
    family(model, 7, prefix_length=3, sentences=True).check(model)
    with pytest.raises(UsageError, match="TransformerModel cannot; give a decoder-only model"):
        family(model, 3).check(tiny_model())
