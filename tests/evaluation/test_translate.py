"""What translators say, against fairseq's own generation and one plain forward a word."""
import pytest
import torch

from fairseq_earm.evaluation.translate import fitting, open_translators, pairs_hash
from tests.tiny_translation import command, generate, tagged, write_text

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pair(tiny):
    return open_translators([("--path", str(tiny.a)), ("--against", str(tiny.b))], str(tiny.data), "test", device=CPU)


def plain_logits(translator, index, context):
    """(V,) logits after a context, of one sentence and by the whole model."""
    source = translator.dataset[index]["source"].unsqueeze(0)
    read = torch.tensor([[translator.task.target_dictionary.eos(), *context]])
    with torch.no_grad():
        return translator.model(source, torch.tensor([source.size(1)]), read)[0][0, -1]


def test_translations_are_those_of_fairseq_generate(tiny, pair):
    for name, translator in zip("ab", pair):
        printed = tagged(generate(tiny, "--beam", 3, "--max-len-b", 200, models=name), "H")
        found = translator.translate([5, 0, 3], beam=3)
        for index, tokens in zip([5, 0, 3], found):
            assert translator.task.target_dictionary.string(tokens) == printed[index][0].split("\t")[1]


def test_scores_of_words_in_any_context(pair, monkeypatch):
    """Also right after a beam search, in several batches, and with the same sentence twice."""
    translator = pair[0]
    translator.translate([0, 1], beam=4)
    eos = translator.task.target_dictionary.eos()
    *_, one, other = sorted(range(7), key=lambda index: translator.dataset.tgt_sizes[index])
    references = [[*translator.reference(index), eos] for index in (one, other)]
    indices = [one, other, one, 4]
    words = [*references, references[0][:1], []]
    contexts = [references[0], references[1][::-1], [], [7, 8]]
    monkeypatch.setattr("fairseq_earm.evaluation.translate.MAX_LOGITS", 500)
    found = translator.score(indices, contexts, words)
    assert [len(scores.rank) for scores in found] == [len(row) for row in words] and len(words[1]) > 2
    for index, context, row, scores in zip(indices, contexts, words, found):
        for step, word in enumerate(row):
            logits = plain_logits(translator, index, context[:step])
            assert scores.logsumexp[step] == pytest.approx(logits.logsumexp(-1).item(), abs=1e-4)
            assert scores.log_prob[step] == pytest.approx(logits.log_softmax(-1)[word].item(), abs=1e-4)
            assert scores.rank[step] == 1 + logits.argsort(descending=True).tolist().index(word)
    assert {int(rank) for scores in found for rank in scores.rank} > {1, 2}


def test_a_temperature_changes_probabilities_and_no_ranks(pair, monkeypatch):
    translator = pair[0]
    references = [translator.reference(index) for index in range(7)]
    sharp = translator.score(range(7), references, references)
    output = translator.model.decoder.output_layer
    monkeypatch.setattr(translator.model.decoder, "output_layer", lambda features: output(features) / 2)
    flat = translator.score(range(7), references, references)
    for one, other in zip(sharp, flat):
        assert torch.equal(one.rank, other.rank) and not torch.allclose(one.log_prob, other.log_prob, atol=0.05)


def test_sources_and_references_are_words(tiny, pair):
    lines = (tiny.folder / "test.tgt").read_text().splitlines()
    for index, line in enumerate(lines):
        assert pair[0].task.target_dictionary.string(pair[0].reference(index)) == line
        assert len(pair[0].source(index)) == pair[0].dataset.src_sizes[index] - 1
    assert pairs_hash(pair[0].dataset, [0, 1]) != pairs_hash(pair[0].dataset, [1, 0])


def test_data_read_ahead_are_the_same_pairs(tiny, pair, tmp_path):
    dictionaries = ["--srcdict", tiny.data / "dict.src.txt", "--tgtdict", tiny.data / "dict.tgt.txt"]
    where = [*dictionaries, "--testpref", tiny.folder / "test", "--destdir", tmp_path, "--dataset-impl", "cached"]
    command("preprocess", "-s", "src", "-t", "tgt", *where, "--workers", 1)
    [ahead] = open_translators([("--path", str(tiny.a))], str(tmp_path), "test", device=CPU)
    assert pairs_hash(ahead.dataset, range(7)) == pairs_hash(pair[0].dataset, range(7))
    assert ahead.translate([5, 0], beam=2) == pair[0].translate([5, 0], beam=2)


def test_pairs_that_a_model_has_no_positions_for_are_left_out(pair):
    longest = int(pair[0].dataset.tgt_sizes.max())
    short = pair[1]._replace(model=WithPositions(64, longest - 1))
    assert fitting(pair) == list(range(7))
    assert fitting([pair[0], short]) == [i for i in range(7) if pair[0].dataset.tgt_sizes[i] < longest]
    with pytest.raises(SystemExit, match="none of its 7 sentences fits"):
        fitting([short._replace(model=WithPositions(64, 0))])


class WithPositions:
    """As much of a model as says how long its sentences may be."""

    def __init__(self, *limits):
        self.limits = limits

    def max_positions(self):
        return self.limits


def test_what_cannot_be_compared_is_refused(tiny, text, energy, tmp_path):
    write_text(tmp_path, {"train": 20, "test": 3}, seed=9)
    (tmp_path / "train.src").write_text("other words\n" * 20)
    prefixes = [f"--{split}pref={tmp_path / split}" for split in ("train", "test")]
    command("preprocess", "-s", "src", "-t", "tgt", *prefixes, "--destdir", tmp_path / "other", "--workers", 1)
    (tmp_path / "junk.pt").write_text("no checkpoint")
    for path, data, split, message in (
        (tiny.a, tiny.data, "none", "--gen-subset none: .* has no such split"),
        (tmp_path / "none.pt", tiny.data, "test", "--path .*none.pt: there is no such file"),
        (tmp_path / "junk.pt", tiny.data, "test", "--path .*junk.pt: not a checkpoint that can be used"),
        (text.base, tiny.data, "test", "--path .*: not a checkpoint that can be used"),
        (tiny.a, tmp_path / "nowhere", "test", "there is no such folder"),
        (tiny.a, tmp_path / "other", "test", "--path .*: its source dictionary is not the data's"),
    ):
        with pytest.raises(SystemExit, match=message):
            open_translators([("--path", str(path))], str(data), split, device=CPU)


def test_the_other_direction_is_refused(tiny, tmp_path):
    from tests.tiny_translation import train

    turned = train(tiny, tmp_path, "-s", "tgt", "-t", "src", "--max-update", 1).folder / "checkpoint_last.pt"
    with pytest.raises(SystemExit, match="--against .*: its source dictionary is not that of --path"):
        open_translators([("--path", str(tiny.a)), ("--against", str(turned))], str(tiny.data), "test", device=CPU)
