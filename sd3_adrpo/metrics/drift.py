"""How far the policy's velocities are from the base's, on images that the policy draws."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..flow import add_noise, seeded_noise
from ..policy import Policy
from ..seeds import seed_for
from ..types import Condition

DRIFT_SIGMAS = (0.9, 0.7, 0.5, 0.3, 0.1)


def w2_drift(policy: Policy, *args, **kwargs) -> Tensor:
    """|v - v_ref|^2 as a mean over C, h, w and `sigmas`, (B,) float32 on the CPU; arguments of `compare_velocities`."""
    return compare_velocities(policy, *args, **kwargs)[0].mean(1)


@torch.no_grad()
def compare_velocities(
    policy: Policy,
    clean: Tensor,
    condition: Condition,
    prompt: Tensor,
    seeds: Sequence[int],
    sigmas: Sequence[float] = DRIFT_SIGMAS,
    batch_size: int = 16,
) -> tuple[Tensor, Tensor]:
    """Drift |v - v_ref|^2 as a mean over C, h, w, and norm ratio |v| / |v_ref|: each (B, sigmas) float32 on the CPU.

    At noised `clean` (B, C, h, w), noise from each row's own seed. `condition` (N rows) is picked by `prompt` (B,).
    Reinforcement learning tends to inflate the norm, which shows as saturated images (arXiv 2606.27771).
    """
    device = policy.model.device
    per_call = max(1, batch_size // len(sigmas))
    grid, drift, ratio = torch.tensor(sigmas), [], []
    for start in range(0, len(clean), per_call):
        rows = slice(start, start + per_call)
        names = [seed_for(seed, "drift", number) for seed in seeds[rows] for number in range(len(sigmas))]
        noise = seeded_noise(names, clean.shape[1:])
        sigma = grid.repeat(len(noise) // len(grid))
        noisy = add_noise(clean[rows].repeat_interleave(len(grid), 0), noise, sigma).to(device)
        given = condition.select(prompt[rows].repeat_interleave(len(grid))).to(device)
        velocity = policy.velocity(noisy, sigma.to(device), given).float().flatten(1)
        with policy.reference():
            reference = policy.velocity(noisy, sigma.to(device), given).float().flatten(1)
        drift.append((velocity - reference).square().mean(1).view(-1, len(grid)).cpu())
        ratio.append((velocity.norm(dim=1) / reference.norm(dim=1)).view(-1, len(grid)).cpu())
    return torch.cat(drift), torch.cat(ratio)
