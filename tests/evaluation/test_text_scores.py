import sys
from types import SimpleNamespace

import numpy as np
import pytest
import sacrebleu

from fairseq_earm.evaluation.text_scores import Bleu, Meteor, Rouge, bleu_statistics, corpus_bleu, mean_score

REFERENCES = ["The cat sat on the mat .", "A dog barks at a man .", "Two men play chess in a park , today ."]
OTHERS = ["On the mat there sat the cat .", "A dog is barking .", "Two people are playing chess ."]
HYPOTHESES = ["The cat sat on a mat .", "a dog barks at the man", ""]


@pytest.mark.parametrize("tokenizer", ["13a", "none", "char"])
@pytest.mark.parametrize("lowercase", [False, True])
@pytest.mark.parametrize("references", [[REFERENCES], [REFERENCES, OTHERS]])
def test_summed_statistics_give_sacrebleus_corpus_score(tokenizer, lowercase, references):
    rows = bleu_statistics(HYPOTHESES, references, tokenizer, lowercase=lowercase)
    assert rows.shape == (3, 10) and rows.dtype == np.int64
    for chosen in ([0, 1, 2], [0, 0, 1], [1, 2, 2]):
        texts, own = [HYPOTHESES[i] for i in chosen], [[each[i] for i in chosen] for each in references]
        expected = sacrebleu.corpus_bleu(texts, own, tokenize=tokenizer, lowercase=lowercase).score
        assert corpus_bleu(rows[chosen].sum(0)) == expected
    assert corpus_bleu(rows.sum(0)) > 5


def test_statistics_of_a_sentence_by_hand():
    # "a" is matched once of its two times; of the bigrams "a b" and "b c"; the longer reference is as near, so the shorter counts.
    rows = bleu_statistics(["a b c a"], [["a b c d e"], ["b b x"]], "none")
    assert rows.tolist() == [[4, 3, 3, 2, 1, 0, 4, 3, 2, 1]]


def test_no_sentences_score_nothing():
    assert bleu_statistics([], [[]]).shape == (0, 10)
    assert corpus_bleu(bleu_statistics([], [[]]).sum(0)) == 0


@pytest.mark.parametrize("references", [[], REFERENCES, [REFERENCES[:2]], [REFERENCES, OTHERS[:1]]])
def test_references_are_translations_of_every_sentence(references):
    with pytest.raises(ValueError, match="a list of 3 texts"):
        bleu_statistics(HYPOTHESES, references)


def rows_of(metric, hypotheses):
    """Name → score of each sentence, of 100."""
    return {name: [mean_score(row) for row in rows] for name, rows in metric.statistics(hypotheses).items()}


def test_bleu_has_sacrebleus_signature():
    metric = Bleu([REFERENCES, OTHERS], "intl", lowercase=True)
    expected = sacrebleu.metrics.BLEU(tokenize="intl", lowercase=True)
    score = expected.corpus_score(HYPOTHESES, [REFERENCES, OTHERS]).score
    assert metric.score(metric.statistics(HYPOTHESES)["BLEU"].sum(0)) == score
    assert metric.signature() == f"BLEU|{expected.get_signature()}"
    assert "nrefs:2|case:lc|eff:no|tok:intl|smooth:exp|version:" in metric.signature()


def test_rouge_by_hand():
    pytest.importorskip("rouge_score")
    # Of 4 words and 5: three in common; of 3 pairs and 4: "a b" alone; a, b and d in one order.
    found = rows_of(Rouge([["a b c d e"]]), ["A b; d, x"])
    assert found["ROUGE-1"] == pytest.approx([100 * 2 * 3 / 9])
    assert found["ROUGE-2"] == pytest.approx([100 * 2 * 1 / 7])
    assert found["ROUGE-L"] == pytest.approx([100 * 2 * 3 / 9])
    assert rows_of(Rouge([["a b c d"]]), ["d c b a"])["ROUGE-L"] == pytest.approx([25])
    assert rows_of(Rouge([["running"]]), ["runs"])["ROUGE-1"] == [0]  # no stemmer, as the signature says
    assert "|stemmer:no|score:F1|rouge-score:" in Rouge([[""]]).signature()


def test_rouge_takes_the_best_reference_of_each_sentence_as_rouge_score_does():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rouge2", "rougeL"])
    metric = Rouge([REFERENCES, OTHERS])
    rows = metric.statistics(HYPOTHESES)
    expected = [scorer.score_multi(list(own), text) for text, own in zip(HYPOTHESES, zip(REFERENCES, OTHERS))]
    for name, kind in (("ROUGE-1", "rouge1"), ("ROUGE-2", "rouge2"), ("ROUGE-L", "rougeL")):
        mean = np.mean([scores[kind].fmeasure for scores in expected])
        assert metric.score(rows[name].sum(0)) == pytest.approx(100 * mean)
    assert "nrefs:2" in metric.signature()


@pytest.fixture
def synonyms(monkeypatch):
    """A WordNet in which a dog is a hound."""
    corpus = pytest.importorskip("nltk.corpus")
    dog = SimpleNamespace(lemmas=lambda: [SimpleNamespace(name=lambda name=name: name) for name in ("dog", "hound")])
    wordnet = SimpleNamespace(synsets=lambda word: [dog] if word in ("dog", "hound") else [])
    monkeypatch.setattr(corpus, "wordnet", wordnet)
    return wordnet


@pytest.fixture
def no_synonyms(monkeypatch):
    """A machine without nltk's WordNet."""
    corpus = pytest.importorskip("nltk.corpus")

    def synsets(word):
        raise LookupError("Resource wordnet not found.")

    monkeypatch.setattr(corpus, "wordnet", SimpleNamespace(synsets=synsets))


def meteor(matches, chunks, words, reference_words):
    """Banerjee & Lavie 2005 with nltk's parameters."""
    precision, recall = matches / words, matches / reference_words
    return 100 * (1 - 0.5 * (chunks / matches) ** 3) * precision * recall / (0.9 * precision + 0.1 * recall)


def test_meteor_by_hand(no_synonyms):
    metric = Meteor([["a cat sat on the mat", "the dog barks", "he laughed", "x y z"]], "none")
    found = rows_of(metric, ["a cat sat on my mat", "the hound barks", "he laughs", ""])["METEOR"]
    # "my" parts five matches into two runs; "hound" matches nothing, and parts two; stems match as words do.
    assert found == pytest.approx([meteor(5, 2, 6, 6), meteor(2, 2, 3, 3), meteor(2, 1, 2, 2), 0])
    assert "|tok:none|stemmer:Porter|synonyms:none|" in metric.signature() and "nltk:" in metric.signature()


def test_meteor_with_wordnet_matches_synonyms(synonyms):
    metric = Meteor([["the dog barks"]], "none")
    assert rows_of(metric, ["the hound barks"])["METEOR"] == pytest.approx([meteor(3, 1, 3, 3)])
    assert "|synonyms:WordNet|" in metric.signature()


def test_meteor_cuts_words_as_bleu_does_and_takes_the_best_reference(synonyms):
    nltk_score = pytest.importorskip("nltk.translate.meteor_score").meteor_score
    metric = Meteor([["A dog, barking."], ["The cat."]], "13a")
    expected = nltk_score([["A", "dog", ",", "barking", "."], ["The", "cat", "."]], ["the", "cat", "barks", "."], wordnet=synonyms)
    assert rows_of(metric, ["the cat barks."])["METEOR"] == pytest.approx([100 * expected]) and expected > 0.5


@pytest.mark.parametrize(
    "module, metric, library",
    [
        ("rouge_score.rouge_scorer", lambda: Rouge([["a"]]), "--metrics rouge: rouge-score is not installed: pip install rouge-score"),
        ("nltk.translate.meteor_score", lambda: Meteor([["a"]], "none"), "--metrics meteor: nltk is not installed: pip install nltk"),
    ],
)
def test_missing_libraries_are_named(monkeypatch, module, metric, library):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit, match=library):
        metric()
