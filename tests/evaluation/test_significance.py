import random

import numpy as np
import pytest
from sacrebleu.metrics import BLEU
from sacrebleu.significance import PairedTest

from fairseq_earm.evaluation import significance
from fairseq_earm.evaluation.significance import draw_counts, draw_multinomial, paired_bootstrap
from fairseq_earm.evaluation.text_scores import bleu_statistics, corpus_bleu

WORDS = "a b c d e f g h".split()


def texts(seed, *, errors, size=40):
    """References, and translations of which each word is wrong with the probability `errors`."""
    rng = random.Random(0)
    references = [[rng.choice(WORDS) for _ in range(rng.randint(4, 9))] for _ in range(size)]
    rng = random.Random(seed)
    wrong = [[rng.choice(WORDS) if rng.random() < errors else word for word in reference] for reference in references]
    return [" ".join(words) for words in wrong], [" ".join(words) for words in references]


def statistics(seed, errors):
    hypotheses, references = texts(seed, errors=errors)
    return bleu_statistics(hypotheses, [references], "none")


@pytest.mark.parametrize("errors", [0.3, 0.36, 0.6])
@pytest.mark.parametrize("seed", [12345, 3])
def test_one_seed_is_sacrebleus_paired_test(monkeypatch, errors, seed):
    monkeypatch.setenv("SACREBLEU_SEED", str(seed))
    (good, references), (bad, _) = texts(1, errors=0.3), texts(2, errors=errors)
    test = PairedTest([("bad", bad), ("good", good)], {"BLEU": BLEU(tokenize="none")}, [references], "bs", n_samples=200)
    base, system = test()[1]["BLEU"]
    found = paired_bootstrap([statistics(1, 0.3)], [statistics(2, errors)], corpus_bleu, resamples=200, seed=seed)
    assert found.sacrebleu_p_value == system.p_value
    assert found.difference == system.score - base.score
    # Its interval, of the system's own score, comes from the same draws.
    scores = [corpus_bleu(counts @ statistics(1, 0.3)) for counts in np.concatenate(list(draw_counts(40, 200, seed)))]
    assert np.mean(scores) == pytest.approx(system.mean)


def test_p_and_interval_tell_a_difference_from_none():
    same = paired_bootstrap([statistics(1, 0.3)], [statistics(1, 0.3)], corpus_bleu, resamples=100)
    assert same[:4] == (0, 0, 0, 1)
    clear = paired_bootstrap([statistics(1, 0.2)], [statistics(2, 0.6)], corpus_bleu, resamples=100)
    assert clear.p_value == 1 / 101 and 0 < clear.low < clear.difference < clear.high
    turned = paired_bootstrap([statistics(2, 0.6)], [statistics(1, 0.2)], corpus_bleu, resamples=100)
    assert (turned.difference, turned.low, turned.high, turned.p_value) == pytest.approx(
        (-clear.difference, -clear.high, -clear.low, clear.p_value)
    )
    unclear = paired_bootstrap([statistics(1, 0.3)], [statistics(2, 0.3)], corpus_bleu, resamples=100)
    assert unclear.p_value > 0.2 and unclear.low < 0 < unclear.high


def test_of_systems_that_do_not_differ_five_percent_are_told_apart():
    rng = np.random.default_rng(1)
    zero = [np.zeros((60, 1))]
    found = [
        paired_bootstrap([rng.normal(size=(60, 1))], zero, lambda total: total[0], resamples=200, seed=seed) for seed in range(600)
    ]
    # With 3,000 trials, 300 sentences and 1,000 resamples: 0.050, 0.051, 0.109. The standard error is 0.01 here.
    assert np.mean([one.p_value < 0.05 for one in found]) == pytest.approx(0.05, abs=0.025)
    assert np.mean([one.low > 0 or one.high < 0 for one in found]) == pytest.approx(0.05, abs=0.025)
    assert np.mean([one.sacrebleu_p_value < 0.05 for one in found]) == pytest.approx(0.11, abs=0.025)


def test_seeds_are_averaged_within_each_resample():
    system, baseline = [statistics(seed, 0.3) for seed in (1, 2, 3)], [statistics(seed, 0.4) for seed in (4, 5)]
    found = paired_bootstrap(system, baseline, corpus_bleu, resamples=50, seed=7)
    indices = np.random.default_rng(7).choice(40, size=(50, 40), replace=True)

    def gain(chosen):
        means = [np.mean([corpus_bleu(rows[chosen].sum(0)) for rows in seeds]) for seeds in (system, baseline)]
        return means[0] - means[1]

    gains = np.array([gain(row) for row in indices])
    observed = gain(np.arange(40))
    assert found.difference == pytest.approx(observed)
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(gains, [2.5, 97.5])))
    assert found.p_value == ((abs(gains - gains.mean()) >= abs(observed)).sum() + 1) / 51
    assert found.sacrebleu_p_value == ((abs(gains) - abs(gains).mean() > abs(observed)).sum() + 1) / 51
    turned = paired_bootstrap(system, [system[2], system[0], system[1]], corpus_bleu, resamples=50)
    assert turned.difference == pytest.approx(0) and turned.high == pytest.approx(0)  # the same seeds in another order


def test_draws_do_not_depend_on_how_many_are_drawn_at_once(monkeypatch):
    whole = np.concatenate(list(draw_counts(7, 20, 5)))
    monkeypatch.setattr(significance, "DRAWN_AT_ONCE", 21)
    chunks = list(draw_counts(7, 20, 5))
    assert [len(chunk) for chunk in chunks] == [3] * 6 + [2]
    assert (np.concatenate(chunks) == whole).all() and (whole.sum(1) == 7).all()


def test_what_cannot_be_paired_is_refused():
    rows = np.ones((4, 10))
    for system, baseline in (([], [rows]), ([rows], []), ([rows], [rows[:3]])):
        with pytest.raises(ValueError, match="each of the two systems needs a seed"):
            paired_bootstrap(system, baseline, corpus_bleu)


def test_draws_are_the_same_in_blocks_that_take_little_memory(monkeypatch):
    at_once = np.random.default_rng(3).multinomial(30, np.full(30, 1 / 30), size=50)
    monkeypatch.setattr(significance, "DRAWN_AT_ONCE", 200)
    blocks = list(draw_multinomial(30, 50, 3))
    assert max(block.size for block in blocks) <= 200 and np.array_equal(np.concatenate(blocks), at_once)
    assert [len(block) for block in draw_multinomial(500, 2, 3)] == [1, 1]
