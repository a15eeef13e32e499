"""What the energy network reads."""
import pytest
import torch
from fairseq.data import Dictionary

from fairseq_earm.sampling import layout
from fairseq_earm.sampling.layout import joint_dictionary, prefix_continuation, source_target

PAD, EOS = 1, 2


def rows(*sequences, left=False):
    """Sequences padded to one length."""
    longest = max(map(len, sequences))
    padding = [[PAD] * (longest - len(sequence)) for sequence in sequences]
    return torch.tensor([p + list(s) if left else list(s) + p for s, p in zip(sequences, padding)])


def dictionary(*words):
    built = Dictionary()
    for word in words:
        built.add_symbol(word)
    return built


def test_continuations_follow_their_prefixes():
    prefix = torch.tensor([[4, 5], [6, 7]])
    continuation = torch.tensor([[8], [9], [10], [11]])
    expected = [[4, 5, 8], [4, 5, 9], [6, 7, 10], [6, 7, 11]]
    assert prefix_continuation(prefix, continuation).tolist() == expected
    crossed = prefix_continuation(prefix, continuation, torch.tensor([1, 0, 0, 1]))
    assert crossed.tolist() == [[6, 7, 8], [4, 5, 9], [4, 5, 10], [6, 7, 11]]
    assert prefix_continuation(prefix[:, :0], continuation).tolist() == continuation.tolist()


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("left_target", [True, False])
def test_targets_follow_their_sources_without_a_gap(left, left_target):
    source = rows([4, 5, EOS], [6, EOS], left=left)
    target = rows([7, EOS], [EOS], [4, 4, EOS], [5], left=left_target)  # the last was cut before its end
    joined = source_target(source, target, torch.tensor([0, 0, 1, 1]), pad=PAD)
    expected = rows([4, 5, EOS, 7, EOS], [4, 5, EOS, EOS], [6, EOS, 4, 4, EOS], [6, EOS, 5])
    assert joined.tolist() == expected.tolist()
    assert source_target(source, target, pad=PAD).tolist() == expected.tolist()
    shifted = source_target(source, target, pad=PAD, shift=10)
    assert shifted.tolist() == rows([4, 5, EOS, 17, 12], [4, 5, EOS, 12], [6, EOS, 14, 14, 12], [6, EOS, 15]).tolist()
    for longest in (1, 3, 5, 9):
        cut = source_target(source, target, pad=PAD, longest=longest)
        assert cut.tolist() == expected[:, :longest].tolist()


def test_what_is_cut_is_said_once(caplog, monkeypatch):
    monkeypatch.setattr(layout, "_warned_of", set())
    source, target = rows([4, 5, EOS], [6, EOS], left=True), rows([7, 7, EOS], [EOS], [7, EOS], [7, 7, 7, EOS])
    for longest in (None, 6):
        source_target(source, target, pad=PAD, longest=longest)
    assert not caplog.records
    for longest in (4, 4, 5):
        source_target(source, target, pad=PAD, longest=longest)
    said = [record.getMessage() for record in caplog.records]
    assert [message.split(" that the")[0] for message in said] == [
        "2 of 4 sequences of a batch, source and translation together, are longer than the 4 tokens",
        "2 of 4 sequences of a batch, source and translation together, are longer than the 5 tokens",
    ]
    assert "--max-positions" in said[0]


def test_no_target_at_all():
    assert source_target(rows([4, EOS]), torch.zeros(0, 3, dtype=torch.long), pad=PAD).shape == (0, 0)


def test_languages_with_one_dictionary_share_it():
    one, other = dictionary("a", "b"), dictionary("a", "b")
    joint, shift = joint_dictionary(one, other)
    assert joint is one and shift == 0


def test_symbols_that_a_dictionary_repeats_keep_their_places():
    source, target = dictionary("<s>", "a", "b", "c"), dictionary("b", "<s> (target)")
    for repeated in (source, target):
        repeated.add_symbol("<s>", overwrite=True)
    joint, shift = joint_dictionary(source, target)
    assert shift == len(source) and len(joint) == len(source) + len(target)
    assert joint.symbols[:shift] == source.symbols
    assert [symbol.rsplit(" ", 1)[0] for symbol in joint.symbols[shift:]] == target.symbols
    assert (joint.pad(), joint.eos(), joint.bos()) == (source.pad(), source.eos(), source.bos())


def test_namesakes_of_two_languages_are_two_words():
    source, target = dictionary("a", "b"), dictionary("b", "c", "d")
    joint, shift = joint_dictionary(source, target)
    assert len(joint) == len(source) + len(target) == len(set(joint.symbols))
    assert joint.symbols[: len(source)] == source.symbols
    for symbol in target.symbols:
        assert joint[target.index(symbol) + shift].split()[0] == symbol
    assert (joint.pad(), joint.eos(), joint.bos(), joint.unk()) == (source.pad(), source.eos(), source.bos(), source.unk())
