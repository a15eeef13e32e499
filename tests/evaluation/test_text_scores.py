import numpy as np
import pytest
import sacrebleu

from fairseq_earm.evaluation.text_scores import bleu_statistics, corpus_bleu

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
