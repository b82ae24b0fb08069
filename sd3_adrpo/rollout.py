"""Prompts to latents: the ODE sampler over a model's velocity. Guidance, of training too, lives here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .flow import Velocity, sde_step, seeded_noise, solve
from .models.sd3 import SD3
from .types import Batch, Condition


def guided(velocity: Callable, condition: Condition, negative: Condition | None, scale: float) -> Velocity:
    """(noisy, sigma) -> v, with classifier-free guidance (arXiv 2207.12598) as one call of twice the batch when asked.

    v = v_negative + scale (v_condition - v_negative); scale 1 is the conditional velocity itself, for half the price.
    """
    if scale == 1.0:
        return lambda noisy, sigma: velocity(noisy, sigma, condition)
    if negative is None:
        raise ValueError(f"guidance_scale is {scale}: guidance needs the embedding of the negative prompt")
    both = negative.cat(condition)

    def call(noisy: Tensor, sigma: Tensor) -> Tensor:
        v_negative, v_condition = velocity(torch.cat([noisy, noisy]), torch.cat([sigma, sigma]), both).chunk(2)
        return v_negative + scale * (v_condition - v_negative)

    return call


def training_velocity(velocity: Callable, batch: Batch, scale: float) -> Tensor:
    """v (B, C, h, w) at a batch's draws, guided as above where `scale` is not 1.

    Gradients go through the conditional half alone, so the other half keeps no activations and has no backward pass.
    Without gradients it is one call of twice the batch.
    """
    if scale == 1.0 or not torch.is_grad_enabled():
        return guided(velocity, batch.condition, batch.negative, scale)(batch.noisy, batch.sigma)
    with torch.no_grad():
        v_negative = velocity(batch.noisy, batch.sigma, batch.negative)
    return v_negative + scale * (velocity(batch.noisy, batch.sigma, batch.condition) - v_negative)


@torch.no_grad()
def sample(
    model: SD3,
    condition: Condition,
    prompt_index: Tensor,
    seeds: Sequence[int],
    sigmas: Tensor,
    shape: Sequence[int],
    *,
    solver: str = "euler",
    guidance_scale: float = 1.0,
    negative: Condition | None = None,
    batch_size: int = 16,
    velocity: Callable | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Latents (B, C, h, w), float32 on the CPU, sampled from each seed's own noise.

    `condition` (N rows) is indexed by `prompt_index` (B,); `negative` has N rows or one for all. The latent is kept in
    float32 between the model's calls, whatever the model computes in. `progress` is told the images of each batch.
    """
    velocity = velocity or model.velocity
    parts = []
    for start in range(0, len(seeds), batch_size):
        rows = slice(start, start + batch_size)
        index = prompt_index[rows]
        noise = seeded_noise(seeds[rows], shape).to(model.device)
        against = None
        if negative is not None and guidance_scale != 1.0:
            against = negative.select(index).to(model.device)
        field = guided(velocity, condition.select(index).to(model.device), against, guidance_scale)
        parts.append(solve(field, noise, sigmas, solver).cpu())
        if progress:
            progress(len(index))
    return torch.cat(parts) if parts else torch.zeros(0, *shape)


@torch.no_grad()
def sample_path(
    model: SD3,
    condition: Condition,
    prompt_index: Tensor,
    seeds: Sequence[int],
    sigmas: Tensor,
    shape: Sequence[int],
    noise_level: float,
    velocity: Callable | None = None,
) -> tuple[Tensor, Tensor]:
    """A stochastic path (B, S + 1, C, h, w) from each seed, noise first, and the velocities (B, S, C, h, w) along it.

    Steps are Gaussian (`flow.sde_step`) but for the last, which is Euler's. No guidance: a path's probability is that
    of the policy itself. One batch; float32 on the CPU.
    """
    velocity, condition = velocity or model.velocity, condition.select(prompt_index).to(model.device)
    noise = seeded_noise(seeds, (len(sigmas) - 1, *shape)).to(model.device)
    path, velocities = [noise[:, 0]], []
    for step, (sigma, to) in enumerate(zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True)):
        at, towards = (torch.full((len(noise),), value, device=noise.device) for value in (sigma, to))
        velocities.append(velocity(path[-1], at, condition).float())
        last = to == 0
        mean, std = sde_step(path[-1], velocities[-1], at, towards, 0.0 if last else noise_level)
        path.append(mean if last else mean + std * noise[:, step + 1])
    return torch.stack(path, dim=1).cpu(), torch.stack(velocities, dim=1).cpu()
