"""What is counted of samples, against counting by hand."""
import pytest
import torch

from fairseq_earm.sampling.samples import Samples


def drawn(*rows, given=0, padding=1):
    """Samples of these tokens, of which the first `given` are not drawn."""
    tokens = torch.full((len(rows), max(map(len, rows), default=0)), padding)
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
        mask[i, given : len(row)] = True
    nothing = torch.zeros(len(rows))
    return Samples(tokens, mask, torch.zeros(tokens.shape), nothing.bool(), nothing.long())


@pytest.mark.parametrize("rows, distinct", [
    ([], 0), ([(4, 2)], 1), ([(4, 2)] * 5, 1), ([(4, 2), (2, 4)], 2), ([(4, 2), (4,)], 2), ([(4, 1), (4,)], 2), ([(0,), (0, 0)], 2),
    ([(5, 4, 2), (4, 5, 2), (5, 4, 2), (4, 2), (5, 4)], 4),
])
def test_distinct_by_hand(rows, distinct):
    assert drawn(*rows).distinct == distinct


def test_distinct_is_of_what_was_drawn():
    assert drawn((7, 4, 2), (8, 4, 2), (8, 5, 2), given=1).distinct == 2
    one, other = (drawn((4, 2), (5, 4, 2), (4, 2), padding=padding) for padding in (1, 9))
    assert one.distinct == other.distinct == 2


@pytest.mark.parametrize("length, vocabulary", [(1, 50_000), (3, 20), (60, 2), (784, 256)])
def test_distinct_as_a_set_counts(length, vocabulary):
    torch.manual_seed(length)
    rows = torch.randint(vocabulary, (600, length))
    rows = rows[torch.randint(600, (900,))]
    rows[::3, -1] = 0  # many differ in little
    rows = [row[: int(cut)] for row, cut in zip(rows.tolist(), torch.randint(max(1, length - 3), length + 1, (900,)))]
    assert drawn(*rows).distinct == len(set(map(tuple, rows)))
