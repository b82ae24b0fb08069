"""Closed forms of the rectified flow: straight lines, known integrals, orders of the solvers."""

import math

import pytest
import torch

from sd3_adrpo import flow


def test_noising_ends_and_target_is_its_derivative():
    clean, noise = torch.randn(2, 3, 1, 4, 4).unbind(0)
    assert torch.equal(flow.add_noise(clean, noise, torch.zeros(3)), clean)
    assert torch.equal(flow.add_noise(clean, noise, torch.ones(3)), noise)
    sigma, step = torch.tensor([0.2, 0.5, 0.7], dtype=torch.double), 1e-3
    clean, noise = clean.double(), noise.double()
    slope = (flow.add_noise(clean, noise, sigma + step) - flow.add_noise(clean, noise, sigma - step)) / (2 * step)
    torch.testing.assert_close(slope, flow.velocity_target(clean, noise))


def test_clean_is_recovered_from_the_true_velocity():
    clean, noise = torch.randn(2, 3, 2, 4, 4).unbind(0)
    sigma = torch.tensor([0.1, 0.6, 0.9])
    noisy = flow.add_noise(clean, noise, sigma)
    torch.testing.assert_close(flow.predict_clean(noisy, noise - clean, sigma), clean, atol=1e-6, rtol=0)


def test_grid_is_shifted_once():
    assert flow.sigma_grid(4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    # 3 s / (1 + 2 s) at 3/4, 1/2, 1/4
    torch.testing.assert_close(flow.sigma_grid(4, 3.0), torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]))


@pytest.mark.parametrize(("steps", "shift"), [(0, 1.0), (4, 0.0), (4, -3.0), (4, float("nan"))])
def test_grid_refuses(steps, shift):
    with pytest.raises(ValueError, match="must be"):
        flow.sigma_grid(steps, shift)


def test_dynamic_shift_is_linear_in_the_logarithm():
    config = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
    assert flow.dynamic_shift(256, config) == pytest.approx(math.exp(0.5))
    assert flow.dynamic_shift(4096, config) == pytest.approx(math.exp(1.15))


@pytest.mark.parametrize("solver", ["euler", "heun", "midpoint"])
def test_solvers_are_exact_on_a_straight_flow(solver):
    clean, noise = torch.randn(2, 3, 2, 4, 4).unbind(0)
    result = flow.solve(lambda noisy, sigma: noise - clean, noise, flow.sigma_grid(5, 3.0), solver)
    torch.testing.assert_close(result, clean, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("midpoint", 2)])
def test_order_of_solvers(solver, order):
    """d x / d sigma = x from sigma = 1 to 0 is x(0) = x(1) / e; halving the step divides the error by 2^order."""
    start = torch.ones(1, 1, 1, 1, dtype=torch.double)

    def error(steps: int) -> float:
        grid = torch.linspace(1, 0, steps + 1)
        return abs(flow.solve(lambda noisy, sigma: noisy, start, grid, solver).item() - math.exp(-1))

    assert error(20) / error(40) == pytest.approx(2**order, rel=0.1)


def test_noise_depends_on_its_seed_alone():
    together = flow.seeded_noise([5, 6, 7], (2, 3, 3))
    assert torch.equal(together[1:2], flow.seeded_noise([6], (2, 3, 3)))
    assert not torch.equal(together[0], together[1])


def test_stratified_sigmas_fill_every_stratum():
    sigma = flow.stratified_sigmas(1000, 4, 1.0, torch.Generator().manual_seed(0))
    assert sigma.shape == (1000, 4)
    assert ((sigma * 4).floor() == torch.arange(4)).float().mean() > 0.99  # the clamp at the ends moves a few
    assert sigma.mean().item() == pytest.approx(0.5, abs=0.01)


def test_highest_training_sigma():
    """Uniform before the shift, up to the uniform value that the shift takes to the highest sigma."""
    generator = torch.Generator().manual_seed(0)
    sigma = flow.stratified_sigmas(4000, 4, 3.0, generator, highest=0.9)
    assert 0.89 < sigma.max().item() <= 0.9 + 1e-6
    uniform = sigma / (3 - 2 * sigma)  # 3 u / (1 + 2 u) undone
    assert uniform.mean().item() == pytest.approx(0.75 / 2, abs=0.005)  # 0.9 / (3 - 1.8) = 0.75
    again = flow.stratified_sigmas(4000, 4, 3.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(flow.shift_sigma(0.75 * again / (3 - 2 * again), 3.0), sigma, atol=2e-3, rtol=0)
