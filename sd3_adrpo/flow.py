"""Rectified flow on plain tensors: noising, targets, sigma grids, ODE solvers. Convention and shapes: types.py.

Sources: flow matching, arXiv 2210.02747; rectified flow, arXiv 2209.03003; SD3 and its sigma shift, arXiv 2403.03206.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]  # (noisy (B, C, h, w), sigma (B,)) -> velocity (B, C, h, w)


def _column(sigma: Tensor, like: Tensor) -> Tensor:
    return sigma.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def add_noise(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """noisy = (1 - sigma) clean + sigma noise, with sigma (B,)."""
    sigma = _column(sigma, clean)
    return (1 - sigma) * clean + sigma * noise


def velocity_target(clean: Tensor, noise: Tensor) -> Tensor:
    """u = noise - clean, the derivative of `add_noise` by sigma."""
    return noise - clean


def predict_clean(noisy: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """clean = noisy - sigma velocity, with sigma (B,)."""
    return noisy - _column(sigma, noisy) * velocity


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """SD3's shift for resolution, sigma' = shift sigma / (1 + (shift - 1) sigma) (arXiv 2403.03206, eq. 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def sigma_grid(steps: int, shift: float = 1.0) -> Tensor:
    """Sigmas (steps + 1,) from 1 down to 0: uniform, then shifted once.

    diffusers' scheduler shifts its own end points a second time and ends at 0.0089 before 0, a step that does nothing.
    """
    if steps < 1:
        raise ValueError(f"num_inference_steps is {steps}; it must be at least 1")
    if not shift > 0:
        raise ValueError(f"shift is {shift}; it must be positive (1 leaves the grid uniform, SD3 uses 3)")
    return shift_sigma(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).float()


def dynamic_shift(image_tokens: int, scheduler_config: Mapping[str, Any]) -> float:
    """exp(mu) with mu linear in the number of image tokens, as diffusers' pipelines compute it from the scheduler."""
    tokens_low, tokens_high = scheduler_config["base_image_seq_len"], scheduler_config["max_image_seq_len"]
    low, high = scheduler_config["base_shift"], scheduler_config["max_shift"]
    return math.exp(low + (high - low) * (image_tokens - tokens_low) / (tokens_high - tokens_low))


def stratified_sigmas(
    samples: int, draws: int, shift: float, generator: torch.Generator, highest: float = 1.0
) -> Tensor:
    """Training sigmas (samples, draws) in (0, highest): for each sample one from each of `draws` equal strata.

    They are uniform before the shift, up to where the shift leads to `highest`. Stratification leaves the mean of any
    function of sigma as it is and lowers its variance.
    """
    uniform = torch.rand(samples, draws, generator=generator)
    strata = (torch.arange(draws) + uniform) / draws * shift_sigma(torch.tensor(highest), 1 / shift)
    # the clamp keeps sigma off its ends, where the target is pure noise or the velocity carries nothing
    return shift_sigma(strata, shift).clamp(1e-3, 1 - 1e-3)


def seeded_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Standard normal (B, *shape) on the CPU, each row from its own seed: batches and processes cannot change it."""
    return torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def euler(velocity: Velocity, noisy: Tensor, sigma: float, to: float) -> Tensor:
    return noisy + (to - sigma) * _at(velocity, noisy, sigma)


def heun(velocity: Velocity, noisy: Tensor, sigma: float, to: float) -> Tensor:
    slope = _at(velocity, noisy, sigma)
    ahead = _at(velocity, noisy + (to - sigma) * slope, to)
    return noisy + (to - sigma) * (slope + ahead) / 2


def midpoint(velocity: Velocity, noisy: Tensor, sigma: float, to: float) -> Tensor:
    half = noisy + (to - sigma) / 2 * _at(velocity, noisy, sigma)
    return noisy + (to - sigma) * _at(velocity, half, (sigma + to) / 2)


SOLVERS = {"euler": euler, "heun": heun, "midpoint": midpoint}


def sde_step(noisy: Tensor, velocity: Tensor, sigma: Tensor, to: Tensor, noise_level: float) -> tuple[Tensor, Tensor]:
    """Mean (B, C, h, w) and standard deviation (B, 1, 1, 1) of a step of the SDE with the ODE's marginals.

        mean = noisy + d [v + s^2 / (2 sigma) (noisy + (1 - sigma) v)]      d = to - sigma < 0
        std = s sqrt(-d)                                                    s = a sqrt(sigma / (1 - sigma))

    Flow-GRPO, arXiv 2505.05470, eq. 9, with a = `noise_level`; a = 0 is Euler's step. At sigma = 1, where s is
    infinite, `to` stands in its denominator. sigma and to (B,); the last step, to 0, is the caller's to make without
    noise.
    """
    sigma, to = _column(sigma, noisy), _column(to, noisy)
    level = noise_level * (sigma / (1 - torch.where(sigma < 1, sigma, to))).sqrt()
    drift = velocity + level**2 / (2 * sigma) * (noisy + (1 - sigma) * velocity)
    return noisy + (to - sigma) * drift, level * (sigma - to).sqrt()


def _at(velocity: Velocity, noisy: Tensor, sigma: float) -> Tensor:
    return velocity(noisy, torch.full((len(noisy),), sigma, device=noisy.device)).to(noisy.dtype)


def solve(
    velocity: Velocity,
    noisy: Tensor,
    sigmas: Tensor,
    solver: str = "euler",
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """Integrates d noisy / d sigma = velocity along `sigmas` (S + 1,). Euler costs S calls, Heun and midpoint 2 S."""
    if solver not in SOLVERS:
        raise ValueError(f"solver is {solver!r}; allowed are {', '.join(SOLVERS)}")
    grid = sigmas.tolist()  # once: no synchronisation with the device within the loop
    for sigma, to in zip(grid[:-1], grid[1:], strict=True):
        noisy = SOLVERS[solver](velocity, noisy, sigma, to)
        if on_step:
            on_step()
    return noisy
