"""Energies against their definitions, and label smoothing against fairseq's."""
import math

import pytest
import torch
from fairseq.criterions.label_smoothed_cross_entropy import label_smoothed_nll_loss

from fairseq_earm.ebm.energy import last_step, log_mu, smoothed_nll, token_energies

LOGITS = torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TARGET = torch.randint(7, (3, 4), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[True, True, True, False], [True, False, False, False], [True, True, True, True]])


def test_nll_and_phi_are_what_they_are_called():
    energies = token_energies(LOGITS, TARGET)
    for row in range(3):
        for step in range(4):
            logits, token = LOGITS[row, step], TARGET[row, step]
            assert energies.nll[row, step].item() == pytest.approx(-logits.softmax(0)[token].log().item())
            assert energies.phi[row, step].item() == -logits[token].item()
            assert energies.logsumexp[row, step].item() == pytest.approx(math.log(sum(math.exp(z) for z in logits.tolist())))


def test_gradcheck():
    logits = LOGITS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: tuple(token_energies(z, TARGET)), [logits])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_before_the_logsumexp(dtype):
    large = 80 + LOGITS.to(dtype)  # exp(80) overflows half precision
    energies = token_energies(large, TARGET)
    assert energies.logsumexp.dtype == torch.float32
    assert torch.allclose(energies.logsumexp.double(), large.double().logsumexp(-1), rtol=1e-6)


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.3])
def test_label_smoothing_is_fairseqs(epsilon):
    expected, _ = label_smoothed_nll_loss(LOGITS.log_softmax(-1).view(-1, 7), TARGET.view(-1), epsilon, reduce=False)
    smoothed = smoothed_nll(token_energies(LOGITS, TARGET), LOGITS.mean(-1), 7, epsilon)
    assert torch.allclose(smoothed.view(-1), expected.view(-1))


def test_log_mu_reads_the_last_step():
    energies = token_energies(LOGITS, TARGET)
    assert last_step(MASK).tolist() == [2, 0, 3]
    assert log_mu(energies.logsumexp, MASK).tolist() == [energies.logsumexp[i, k].item() for i, k in enumerate([2, 0, 3])]
