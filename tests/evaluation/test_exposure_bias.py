"""Counts of likelier words against a case worked out by hand, intervals against exact distributions."""
import math

import pytest
import torch

from fairseq_earm.errors import UsageError
from fairseq_earm.evaluation.exposure_bias import FEWEST_PAIRS, measure_pairs, summarize
from fairseq_earm.evaluation.translate import WordScores

X, Y = 4, 5


class ByHand:
    """A translator of one sentence whose probabilities are written down: context → probability of X; of Y it is the rest."""

    def __init__(self, translation, reference, likely):
        self.translation, self.own_reference, self.likely = translation, reference, likely

    def reference(self, index):
        return self.own_reference

    def translate(self, indices, *, beam):
        return [self.translation for _ in indices]

    def score(self, indices, contexts, words):
        return [self._score(context, row) for context, row in zip(contexts, words)]

    def _score(self, context, words):
        likely = [self.likely[tuple(context[:step])] for step in range(len(words))]
        probs = torch.tensor([p if word == X else 1 - p for p, word in zip(likely, words)])
        return WordScores(probs.log(), 1 + (probs < 0.5).long(), torch.zeros(len(words)))


REFERENCE = [X, Y, X]
# A writes x and ends, B writes y y x x: both reach the reference's first two words, of three.
A = ByHand([X], REFERENCE, {(): 0.6, (X,): 0.7, (X, Y): 0.9})
B = ByHand([Y, Y, X, X], REFERENCE, {(): 0.5, (X,): 0.8, (Y,): 0.6, (X, Y): 0.1})


def test_a_case_by_hand():
    """First word: .6 against .5. Second, y: A after x .3, B after its own y .4, but after x .2."""
    record, = measure_pairs([A, B], [8], beam=2)
    assert record["index"] == 8 and record["words"] == 3
    a = [math.log(0.6), math.log(0.3)]
    assert record["own"]["probability"] == [pytest.approx(a), pytest.approx([math.log(0.5), math.log(0.4)])]
    assert record["reference"]["probability"] == [pytest.approx(a), pytest.approx([math.log(0.5), math.log(0.2)])]
    assert record["own"]["rank"] == record["reference"]["rank"] == [[1, 2], [1, 2]]
    report = summarize([record])
    assert (report["pairs"], report["words"], report["not_reached"]) == (1, 2, 1)
    assert report["probability"]["own"] == {"greater": 1, "less": 1, "ties": 0, "ratio": 0.5, "interval": [0.5, 0.5]}
    assert report["probability"]["reference"]["greater"] == 2 and report["probability"]["reference"]["ratio"] == 1
    assert report["probability"]["difference"] == {"ratio": -0.5, "interval": [-0.5, -0.5]}
    assert report["rank"]["own"] == {"greater": 0, "less": 0, "ties": 2, "ratio": None, "interval": None}
    assert report["rank"]["difference"] == {"ratio": None, "interval": None}


def test_a_lower_rank_is_better():
    sure, = measure_pairs([ByHand([], [X], {(): 0.6}), ByHand([], [X], {(): 0.4})], [0], beam=1)
    assert sure["own"]["rank"] == [[1], [2]] and summarize([sure])["rank"]["own"]["greater"] == 1


def test_a_translation_of_nothing_reaches_the_first_word():
    nothing = ByHand([], REFERENCE, {(): 0.6})
    record, = measure_pairs([nothing, B], [0], beam=1)
    assert record["own"] == record["reference"]
    assert record["own"]["probability"] == [pytest.approx([math.log(0.6)]), pytest.approx([math.log(0.5)])]


def test_a_reference_shorter_than_the_translations_is_reached_to_its_end():
    record, = measure_pairs([ByHand([Y, X, X], [X], {(): 0.6}), ByHand([X, X], [X], {(): 0.7})], [0], beam=1)
    assert len(record["own"]["rank"][0]) == record["words"] == 1 and summarize([record])["probability"]["own"]["less"] == 1


def pairs(outcomes):
    """Records of pairs: each a list of outcomes in the models' own context (1, 0, ½ for a tie); lost in the reference's."""
    level = {1: (1, 2), 0: (2, 1), 0.5: (4, 4)}
    records = []
    for index, words in enumerate(outcomes):
        own = [[level[word][model] for word in words] for model in (0, 1)]
        lost = [[level[0][model]] * len(words) for model in (0, 1)]
        contexts = {
            context: {"rank": ranks, "probability": [[-1.5 * rank for rank in row] for row in ranks]}
            for context, ranks in (("own", own), ("reference", lost))
        }
        records.append({"index": index, "words": len(words) + 1, **contexts})
    return records


def binomial_quantiles(n, p):
    """The 2.5 and 97.5 % points of Binomial(n, p) / n."""
    at, points = 0.0, []
    for wins in range(n + 1):
        at += math.comb(n, wins) * p**wins * (1 - p) ** (n - wins)
        points += [wins / n] * ((at >= 0.025 and not points) + (at >= 0.975 and len(points) == 1))
    return points


def test_the_interval_is_of_pairs_and_not_of_words():
    """Pairs won or lost as a whole: resampling them is a binomial draw, however many words each has."""
    report = summarize(pairs([[1] * 10] * 12 + [[0] * 10] * 28))
    assert report["probability"]["own"]["ratio"] == pytest.approx(0.3) and report["words"] == 400 and report["not_reached"] == 40
    assert report["probability"]["own"]["interval"] == pytest.approx(binomial_quantiles(40, 0.3), abs=0.026)
    assert report["probability"]["reference"]["interval"] == [0, 0]
    assert report["probability"]["difference"]["interval"] == pytest.approx(report["probability"]["own"]["interval"])


def test_longer_pairs_count_more():
    report = summarize(pairs([[1, 1, 1], [0]]))
    assert report["probability"]["own"]["ratio"] == 0.75 and report["probability"]["own"]["interval"] == [0, 1]


def test_ties_are_left_out():
    report = summarize(pairs([[1, 0.5, 0.5], [1, 0.5], [0, 0.5]]))
    assert report["probability"]["own"]["ratio"] == pytest.approx(2 / 3) and report["probability"]["own"]["ties"] == 4
    assert report["probability"]["own"]["interval"] == [0, 1] and report["probability"]["reference"]["ties"] == 0


def turned(context):
    return {measure: columns[::-1] for measure, columns in context.items()}


def test_exchanging_the_models_turns_the_ratios_round():
    records = pairs([[1, 0, 0.5], [0, 0], [1], [0.5, 0, 1, 0]])
    exchanged = [{**record, "own": turned(record["own"]), "reference": turned(record["reference"])} for record in records]
    first, second = summarize(records), summarize(exchanged)
    for measure in ("probability", "rank"):
        one, other = first[measure], second[measure]
        for context in ("own", "reference"):
            assert other[context]["ratio"] == pytest.approx(1 - one[context]["ratio"])
            assert other[context]["greater"] == one[context]["less"] and other[context]["ties"] == one[context]["ties"]
            assert other[context]["interval"] == pytest.approx([1 - bound for bound in one[context]["interval"][::-1]])
        assert one["own"] == {**one["own"], "greater": 3, "less": 5, "ties": 2, "ratio": 0.375}
        assert other["difference"]["ratio"] == pytest.approx(-one["difference"]["ratio"])


def test_positions():
    """As many pairs as are shown, one of them longer, whose last word nobody else reaches."""
    report = summarize(pairs([[1, 0]] * 15 + [[0, 1]] * (FEWEST_PAIRS - 16) + [[0, 1, 1]]))
    first, second = report["by_position"]
    share = 15 / FEWEST_PAIRS
    assert (first["position"], first["pairs"], second["position"]) == (1, FEWEST_PAIRS, 2)
    for measure in ("probability", "rank"):
        own = first[measure]["own"]
        assert own["ratio"] == pytest.approx(share) and second[measure]["own"]["ratio"] == pytest.approx(1 - share)
        assert own["interval"][0] < share < own["interval"][1] and first[measure]["reference"]["ratio"] == 0


def test_without_words_there_is_no_ratio():
    with pytest.raises(UsageError, match="no word of these references"):
        summarize(pairs([[], []]))
