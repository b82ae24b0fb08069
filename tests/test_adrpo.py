"""ADRPO-FM's loss against numbers derived by hand, and the identities that follow from it."""

import pytest
import torch

from sd3_adrpo.objectives.adrpo import Adrpo
from sd3_adrpo.types import Batch, Condition


def batch_of(advantage, target, reference):
    count = len(advantage)
    condition = Condition(torch.zeros(count, 1, 1), torch.zeros(count, 1))
    noisy = torch.zeros_like(target)
    return Batch(torch.as_tensor(advantage), torch.full((count,), 0.5), noisy, target, reference, condition)


def constant(*values):
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 2, 3, 3).clone()


def test_loss_by_hand():
    # v = 1, u = 3, v_ref = 0: fm = 4, w2 = 1. A = 0.5: 0.5 * 4 + 0.5 * 1 = 2.5. A = -1: -4 + 2 = -2. Mean 0.25.
    loss, metrics = Adrpo().loss(constant(1.0, 1.0), batch_of([0.5, -1.0], constant(3.0, 3.0), constant(0.0, 0.0)))
    assert loss.item() == pytest.approx(0.25)
    assert metrics["fm"].item() == pytest.approx(4.0)
    assert metrics["w2"].item() == pytest.approx(1.0)
    assert metrics["fm_term"].item() == pytest.approx((2.0 - 4.0) / 2)
    assert metrics["w2_term"].item() == pytest.approx((0.5 + 2.0) / 2)
    assert metrics["effective_beta"].item() == pytest.approx(1.25)
    assert metrics["negative_beta_rate"].item() == 0.0


@pytest.mark.parametrize("beta0", [0.3, 1.0, 4.0])
def test_loss_is_regression_on_a_shifted_target(beta0):
    """loss = beta0 |v - v*|^2 + const, v* = v_ref + (A / beta0)(u - v_ref): equal gradients for every A."""
    generator = torch.Generator().manual_seed(0)
    v, u, v_ref = torch.randn(3, 8, 2, 3, 3, generator=generator, dtype=torch.double).float()
    advantage = torch.linspace(-beta0, beta0, 8)
    v.requires_grad_()
    (gradient,) = torch.autograd.grad(Adrpo(beta0=beta0).loss(v, batch_of(advantage, u, v_ref))[0], v)
    target = v_ref + (advantage / beta0).view(-1, 1, 1, 1) * (u - v_ref)
    (expected,) = torch.autograd.grad(beta0 * (v - target).square().flatten(1).mean(1).mean(), v)
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5)


def test_limits():
    v, u, v_ref = constant(0.7), constant(-1.1), constant(0.2)
    fm, w2 = (0.7 + 1.1) ** 2, 0.5**2
    objective = Adrpo(beta0=2.0)
    assert objective.loss(v, batch_of([2.0], u, v_ref))[0].item() == pytest.approx(2 * fm)  # flow matching
    assert objective.loss(v, batch_of([0.0], u, v_ref))[0].item() == pytest.approx(2 * w2)  # penalty alone
    far = 2 * v_ref - u  # A = -beta0: the gradient vanishes on the far side of v_ref
    far.requires_grad_()
    (gradient,) = torch.autograd.grad(objective.loss(far, batch_of([-2.0], u, v_ref))[0], far)
    assert gradient.abs().max().item() < 1e-6


def test_optimum_is_the_covariance_of_advantage_and_target():
    """Over samples with E[u] = v_ref the minimiser is v_ref + Cov(A, u) / beta0 (one noisy point, linear in v)."""
    u = torch.tensor([1.0, 2.0, 6.0]).view(3, 1, 1, 1)
    advantage = torch.tensor([-0.5, 0.0, 0.5])
    v_ref = u.mean().expand(3, 1, 1, 1)
    v = torch.zeros(1, 1, 1, 1, requires_grad=True)
    optimizer = torch.optim.SGD([v], lr=0.25)
    for _ in range(200):
        optimizer.zero_grad()
        Adrpo().loss(v.expand(3, 1, 1, 1), batch_of(advantage, u, v_ref))[0].backward()
        optimizer.step()
    covariance = (advantage * (u.flatten() - u.mean())).mean()
    assert v.item() == pytest.approx((v_ref[0] + covariance).item(), abs=1e-5)


@pytest.mark.parametrize("options", [{"beta0": 0.0}, {"beta0": -1.0}, {"clip_range": 0.0}])
def test_refuses(options):
    with pytest.raises(ValueError, match="must be positive"):
        Adrpo(**options)
