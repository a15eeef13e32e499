"""An optimizer's state finds its own parameters under the other fairseq; `test_both_fairseqs` has the real ones."""
import pytest
import torch
from torch import nn

from fairseq_earm.compat_optimizer import COPIES, fitting_state
from fairseq_earm.errors import UsageError


class Layer(nn.Module):
    """An encoder layer, as stock fairseq has them or as its last main does."""

    def __init__(self, stock):
        super().__init__()
        self.fc1 = nn.Linear(2, 3)
        if stock:
            for name in COPIES:
                self.register_parameter(name, nn.Parameter(torch.zeros(2)))


def model(stock, tied=True):
    made = nn.Sequential(nn.Embedding(4, 2), Layer(stock), nn.Linear(3, 2), Layer(stock), nn.Linear(2, 4, bias=False))
    if tied:
        made[4].weight = made[0].weight
    return made


def trained(stock):
    """A model and its optimizer after a step in which each weight has moments of its own, copies none."""
    made = model(stock)
    optimizer = torch.optim.Adam(made.parameters())
    for number, (name, weight) in enumerate(own(made).items()):
        weight.grad = torch.full_like(weight, 1.0 + number)
    optimizer.step()
    return made, optimizer


def own(made):
    return {name: weight for name, weight in made.named_parameters() if name.split(".")[-1] not in COPIES}


@pytest.mark.parametrize("stock", [False, True], ids=["to the last main", "to stock"])
def test_moments_find_their_weights(stock):
    theirs, saved = trained(not stock)
    ours = model(stock)
    optimizer = torch.optim.Adam(ours.parameters())
    optimizer.load_state_dict(fitting_state(saved.state_dict(), optimizer, ours, Layer, stock))
    assert len(own(theirs)) == len(own(ours)) == 7
    for name, weight in own(ours).items():
        assert torch.equal(optimizer.state[weight]["exp_avg"], saved.state[own(theirs)[name]]["exp_avg"]), name
    assert len(optimizer.state) == 7
    optimizer.step()


@pytest.mark.parametrize("stock", [False, True])
def test_what_fits_or_cannot_be_mended_is_left_alone(stock):
    ours, optimizer = trained(stock)
    state = optimizer.state_dict()
    assert fitting_state(state, optimizer, ours, Layer, stock) is state
    other = torch.optim.Adam(model(not stock, tied=False).parameters()).state_dict()
    assert fitting_state(other, optimizer, ours, Layer, stock) is other
    two = {**state, "param_groups": state["param_groups"] * 2}
    assert fitting_state(two, optimizer, ours, Layer, stock) is two


def flat(size):
    """Half precision's: all weights end to end in one."""
    weight = nn.Parameter(torch.zeros(size))
    optimizer = torch.optim.Adam([weight])
    weight.grad = torch.ones(size)
    optimizer.step()
    return optimizer


def test_moments_that_lie_end_to_end_with_copies_are_refused():
    ours = model(False)
    with pytest.raises(UsageError, match="--fp16 and --bf16 .* --reset-optimizer"):
        fitting_state(flat(60).state_dict(), flat(28), ours, Layer, False)
    fitting = flat(28).state_dict()
    assert fitting_state(fitting, flat(28), ours, Layer, False) is fitting
    plain = flat(60).state_dict()
    assert fitting_state(plain, flat(28), nn.Linear(2, 2), Layer, False) is plain  # no encoder layer is to blame
