"""The loss head against plain autograd in float64: values, gradients, and what it holds in memory."""
import math

import pytest
import torch
import torch.nn.functional as F

from fairseq_earm.ebm import loss_head
from fairseq_earm.ebm.loss_head import projected_statistics, token_statistics


def plain_statistics(logits, target):
    return logits.logsumexp(-1), logits.gather(-1, target.unsqueeze(-1)).squeeze(-1), logits.mean(-1)


def random_steps(dtype=torch.float64, shape=(2, 7), vocabulary=11):
    torch.manual_seed(1)
    logits = (4 * torch.randn(*shape, vocabulary, dtype=torch.float64)).to(dtype)
    return logits.requires_grad_(), torch.randint(0, vocabulary, shape)


def gradient_of(found, parameters, weights):
    """Gradients of a random combination of the statistics, which no two wrong ones have in common."""
    return torch.autograd.grad(sum((each.double() * weight).sum() for each, weight in zip(found, weights)), parameters)


@pytest.fixture(params=[1, 30, 2**18])
def block(request, monkeypatch):
    """Blocks of one row, of some, of all."""
    monkeypatch.setattr(loss_head, "BLOCK", request.param)


def test_values_and_gradients_are_plain_autograd_s(block):
    logits, target = random_steps()
    weights = torch.randn(3, 2, 7, dtype=torch.float64)
    found, expected = token_statistics(logits, target), plain_statistics(logits, target)
    torch.testing.assert_close(tuple(found), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient_of(found, logits, weights), gradient_of(expected, logits, weights), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_a_statistic_that_is_not_used_has_no_gradient(used):
    logits, target = random_steps()
    found, expected = token_statistics(logits, target), plain_statistics(logits, target)
    weights = torch.randn(3, 2, 7, dtype=torch.float64)
    picked = [[each[i] for i in used] for each in (found, expected, weights)]
    torch.testing.assert_close(gradient_of(picked[0], logits, picked[2]), gradient_of(picked[1], logits, picked[2]))


def test_without_the_mean_logit_the_rest_is_the_same(block):
    logits, target = random_steps()
    weight = torch.eye(11, dtype=torch.float64).requires_grad_()
    for statistics in (token_statistics, lambda *args, **flags: projected_statistics(args[0], weight, args[1], rows=4, **flags)):
        found, expected = statistics(logits, target, mean=False), statistics(logits, target)
        assert found.mean_logit is None
        assert all(torch.equal(one, other) for one, other in zip(found[:2], expected[:2]))
        weights = torch.randn(2, 2, 7, dtype=torch.float64)
        assert torch.equal(*(gradient_of(each[:2], logits, weights)[0] for each in (found, expected)))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_half_precision_is_widened(block, dtype, tolerance):
    logits, target = random_steps(dtype)
    exact = logits.detach().double().requires_grad_()
    found, expected = token_statistics(logits, target), plain_statistics(exact, target)
    assert all(each.dtype == torch.float32 for each in found)
    torch.testing.assert_close([each.double() for each in found], list(expected), rtol=1e-6, atol=1e-6)
    weights = torch.randn(3, 2, 7, dtype=torch.float64)
    [gradient], [wanted] = gradient_of(found, logits, weights), gradient_of(expected, exact, weights)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient.double(), wanted, rtol=2 * tolerance, atol=tolerance)


def test_large_logits_and_forbidden_tokens():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [2.0, -math.inf, 1.0]], requires_grad=True)
    found = token_statistics(logits, torch.tensor([0, 1, 2]))
    torch.testing.assert_close(found.logsumexp[:2], torch.tensor([1e4, -1e4 + math.log(3)]))
    found.logsumexp.sum().backward()
    torch.testing.assert_close(logits.grad, logits.detach().softmax(-1))


def test_there_may_be_no_step():
    logits = torch.zeros(0, 5, 3, requires_grad=True)
    found = token_statistics(logits, torch.zeros(0, 5, dtype=torch.long))
    assert all(each.shape == (0, 5) for each in found)
    sum(each.sum() for each in found).backward()
    assert logits.grad.shape == logits.shape


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 14, 100])
def test_from_hidden_states_as_from_their_logits(rows, with_bias):
    torch.manual_seed(2)
    hidden, weight = torch.randn(2, 7, 5, dtype=torch.float64), torch.randn(11, 5, dtype=torch.float64)
    bias = torch.randn(11, dtype=torch.float64) if with_bias else None
    parameters = [each.requires_grad_() for each in (hidden, weight, bias) if each is not None]
    target, weights = torch.randint(0, 11, (2, 7)), torch.randn(3, 2, 7, dtype=torch.float64)
    found = projected_statistics(hidden, weight, target, bias, rows=rows)
    expected = plain_statistics(F.linear(hidden, weight, bias), target)
    torch.testing.assert_close(tuple(found), expected)
    torch.testing.assert_close(gradient_of(found, parameters, weights), gradient_of(expected, parameters, weights))


@pytest.mark.parametrize("device_autocast", [False, True])
def test_states_in_half_precision(device_autocast):
    torch.manual_seed(4)
    hidden, weight, target = torch.randn(9, 16), torch.randn(12, 16), torch.randint(0, 12, (9,))
    half = [each.requires_grad_() for each in ((hidden, weight) if device_autocast else (hidden.bfloat16(), weight.bfloat16()))]
    with torch.autocast("cpu", torch.bfloat16, enabled=device_autocast):
        found = projected_statistics(half[0], half[1], target, rows=4)
        expected = token_statistics(F.linear(half[0], half[1]), target)
    assert all(each.dtype == torch.float32 for each in found)
    torch.testing.assert_close(tuple(found), tuple(expected))
    weights = torch.randn(3, 9, dtype=torch.float64)
    got, wanted = (gradient_of(each, half, weights) for each in (found, expected))
    assert [each.dtype for each in got] == [each.dtype for each in half]
    torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2)


def test_a_tied_embedding_has_both_gradients():
    torch.manual_seed(3)
    weight, target = torch.randn(6, 4, dtype=torch.float64, requires_grad=True), torch.tensor([1, 2, 5])
    read = torch.tensor([0, 1, 2])
    found = projected_statistics(weight[read].tanh(), weight, target, rows=2)
    expected = plain_statistics(weight[read].tanh() @ weight.T, target)
    weights = torch.randn(3, 3, dtype=torch.float64)
    torch.testing.assert_close(gradient_of(found, weight, weights), gradient_of(expected, weight, weights))


class Held(torch.overrides.TorchFunctionMode):
    """The largest tensor that any operation handed out."""

    largest = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if torch.is_tensor(each):
                self.largest = max(self.largest, each.numel())
        return result


def test_from_hidden_states_tokens_by_vocabulary_is_never_held():
    hidden, weight = torch.randn(64, 3, requires_grad=True), torch.randn(50, 3, requires_grad=True)
    target = torch.randint(0, 50, (64,))
    with Held() as held:
        sum(each.sum() for each in projected_statistics(hidden, weight, target, rows=4)).backward()
    assert 4 * 50 <= held.largest < 64 * 50
