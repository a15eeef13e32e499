"""Residual NCE against enumerated distributions."""
import math

import pytest
import torch

from fairseq_earm.ebm.nce import nce_logits, residual_nce_loss

torch.manual_seed(0)
P_DATA = torch.rand(7, dtype=torch.float64).softmax(0)
P_NOISE = (3 * torch.rand(7, dtype=torch.float64)).softmax(0)


def exact_loss(energy, noise_per_data):
    """The expected loss per datum: every sequence of a seven-sequence world, weighted by its probability."""
    nobody = energy[:0]
    data = [residual_nce_loss(e, nobody, noise_per_data=noise_per_data) for e in energy.split(1)]
    noise = [residual_nce_loss(nobody, e, noise_per_data=noise_per_data) for e in energy.split(1)]
    return (P_DATA * torch.stack(data)).sum() + noise_per_data * (P_NOISE * torch.stack(noise)).sum()


@pytest.mark.parametrize("noise_per_data", [1, 3, 16])
def test_the_loss_is_minimal_at_the_residual_energy(noise_per_data):
    energy = torch.zeros(7, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([energy], max_iter=500, tolerance_grad=1e-14, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = exact_loss(energy, noise_per_data)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.allclose(energy.detach(), P_NOISE.log() - P_DATA.log(), atol=1e-5)
    assert float((P_NOISE * (-energy.detach()).exp()).sum()) == pytest.approx(1.0, abs=1e-5)  # normalised by itself


@pytest.mark.parametrize("noise_per_data", [1, 3])
def test_the_loss_of_a_batch_is_the_expectation_over_it(noise_per_data):
    """A batch that holds each sequence as often as its probability says, in 20ths."""
    data, noise = torch.tensor([3, 7, 10]), torch.tensor([9, 1, 10])
    energy = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)
    loss = residual_nce_loss(
        energy.repeat_interleave(data), energy.repeat_interleave(noise * noise_per_data), noise_per_data=noise_per_data
    )
    odds = (-energy).exp() / noise_per_data
    expected = -(data * (odds / (1 + odds)).log()).sum() - (noise_per_data * noise * (1 / (1 + odds)).log()).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_smoothed_labels_are_wrong_with_the_given_probability():
    data, noise = torch.tensor([0.5, -2.0]).double(), torch.tensor([1.0, 0.0]).double()
    smoothed = residual_nce_loss(data, noise, label_smoothing=0.1)
    assert smoothed.item() == pytest.approx(0.9 * residual_nce_loss(data, noise).item() + 0.1 * residual_nce_loss(noise, data).item())


def test_extreme_energies_stay_finite():
    energy = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = residual_nce_loss(energy, energy.flip(0))
    loss.backward()
    assert loss.isfinite() and energy.grad.isfinite().all()


def test_log_odds():
    assert nce_logits(torch.tensor(0.0), 4).item() == pytest.approx(-math.log(4))
