"""A flow in the plane with the toolkit's own objectives, where a run takes seconds and everything can be seen.

The base flow draws from a normal distribution; a reward is a landscape over the plane. There are no prompts: every
`GROUP` consecutive samples count as one prompt's. `eval/landscapes.py` runs and draws them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from scipy.spatial import cKDTree
from torch import Tensor, nn

from .advantages import Advantages
from .draws import fresh_noise, path_steps
from .flow import add_noise, sde_step, seeded_noise, sigma_grid, solve, velocity_target
from .objective import Objective
from .seeds import generator_for, seed_for
from .types import Condition, Rollout

SHAPE = (2, 1, 1)  # a point as a latent
GROUP = 16
STEPS = 10  # of the sampler
BASE_SPREAD = 1.0


def bump(points: Tensor, x: float, y: float, width: float) -> Tensor:
    """exp(-|p - (x, y)|^2 / (2 width^2)) of points (B, 2)."""
    return torch.exp(-(points - torch.tensor([x, y])).square().sum(1) / (2 * width**2))


def noisy(points: Tensor) -> Tensor:
    """A hill, and noise of its own height; the noise depends on the point, as a real reward model's errors do."""
    wave = torch.sin(37 * points[:, 0]) * torch.sin(41 * points[:, 1])
    return bump(points, 1.5, 0.0, 1.0) + 0.7 * wave


LANDSCAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "unimodal": lambda p: bump(p, 1.5, 0.0, 1.0),
    "bimodal": lambda p: 0.5 * bump(p, -1.0, 0.0, 0.7) + bump(p, 2.5, 0.0, 0.7),  # the high mode is the farther one
    "plateau": lambda p: bump(p, 2.0, 0.0, 0.4),  # flat wherever the base draws most
    "deceptive": lambda p: 0.15 * (2 - p[:, 0]).clamp(0, 4) + 1.5 * bump(p, 2.5, 0.0, 0.5),  # leads away from the peak
    "noisy": noisy,
}
BEST = {
    "unimodal": (1.5, 0.0),
    "bimodal": (2.5, 0.0),
    "plateau": (2.0, 0.0),
    "deceptive": (2.5, 0.0),
    "noisy": (1.5, 0),
}


class Field(nn.Module):
    """Velocity (B, 2, 1, 1) of a small network of the point and eight waves of sigma."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(10, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
        )

    def forward(self, point: Tensor, sigma: Tensor) -> Tensor:
        angle = sigma[:, None] * math.pi * 2.0 ** torch.arange(4)
        features = torch.cat([point.flatten(1), angle.sin(), angle.cos()], dim=1)
        return self.layers(features).view(-1, *SHAPE)


def train_base(seed: int = 0, updates: int = 2000, batch: int = 512) -> Field:
    """Flow matching on the normal distribution of `BASE_SPREAD`."""
    torch.manual_seed(seed)
    field, generator = Field(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(field.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for _ in range(updates):
        clean = BASE_SPREAD * torch.randn(batch, *SHAPE, generator=generator)
        noise, sigma = torch.randn(batch, *SHAPE, generator=generator), torch.rand(batch, generator=generator)
        error = field(add_noise(clean, noise, sigma), sigma) - velocity_target(clean, noise)
        optimizer.zero_grad()
        error.square().mean().backward()
        optimizer.step()
        schedule.step()
    return field


@dataclass
class Trace:
    """A run: samples after every epoch (epochs + 1, B, 2), and its curves, the base first."""

    samples: Tensor
    reward: list[float]  # mean over samples
    entropy: list[float]  # nats, of the samples' density
    drift: list[float]  # mean |v - v_ref|^2
    found: list[float]  # share of samples within 1 of the highest mode


def entropy(points: Tensor, neighbour: int = 4) -> float:
    """Kozachenko-Leonenko estimate in nats: digamma(n) - digamma(k) + log pi + 2 mean log distance to the k-th."""
    distance = cKDTree(points.numpy()).query(points.numpy(), k=neighbour + 1)[0][:, -1]
    count = torch.tensor([len(points), neighbour], dtype=torch.double)
    first, second = torch.digamma(count).tolist()
    return first - second + math.log(math.pi) + 2 * torch.tensor(distance).clamp(min=1e-12).log().mean().item()


class Run:
    """The trainer's loop on one landscape, in the plane: the same advantages, draws and loss."""

    def __init__(self, objective: Objective, landscape: str, base: Field, seed: int, rate: float = 1e-3) -> None:
        self.objective, self.landscape, self.seed = objective, landscape, seed
        self.policy, self.base, self.old = copy.deepcopy(base), base, copy.deepcopy(base)
        self.reward, self.advantages = LANDSCAPES[landscape], Advantages(objective.advantage)
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=rate)
        self.condition = Condition(torch.zeros(1, 1, 1), torch.zeros(1, 1))
        self.sigmas = sigma_grid(STEPS)

    def __call__(self, epochs: int = 20, samples: int = 1024, updates: int = 16) -> Trace:
        trace = Trace(torch.empty(0), [], [], [], [])
        clouds = [self._look(trace, samples)]
        for epoch in range(epochs):
            self._epoch(epoch, samples, updates)
            clouds.append(self._look(trace, samples))
        trace.samples = torch.stack(clouds)
        return trace

    @torch.no_grad()
    def _rollout(self, epoch: int, samples: int) -> Rollout:
        field = self.old if self.objective.sampled_by_old else self.policy
        seeds = [seed_for(self.seed, "rollout", epoch, number) for number in range(samples)]
        path = velocity = None
        if self.objective.noise_level:
            path, velocity = self._path(field, seeds)
            clean = path[:, -1]
        else:
            clean = solve(field, seeded_noise(seeds, SHAPE), self.sigmas)
        prompt, rewards = torch.zeros(samples, dtype=torch.long), self.reward(clean.flatten(1))
        return Rollout(prompt, clean, rewards, path=path, velocity=velocity)

    def _path(self, field: Field, seeds: list[int]) -> tuple[Tensor, Tensor]:
        noise = seeded_noise(seeds, (STEPS, *SHAPE))
        path, velocities = [noise[:, 0]], []
        for step, (sigma, to) in enumerate(zip(self.sigmas[:-1], self.sigmas[1:], strict=True)):
            at, towards = sigma.expand(len(noise)), to.expand(len(noise))
            velocities.append(field(path[-1], at))
            level = self.objective.noise_level if to > 0 else 0.0
            mean, std = sde_step(path[-1], velocities[-1], at, towards, level)
            path.append(mean + std * noise[:, step + 1] if to > 0 else mean)
        return torch.stack(path, 1), torch.stack(velocities, 1)

    def _epoch(self, epoch: int, samples: int, updates: int) -> None:
        objective, rollout = self.objective, self._rollout(epoch, samples)
        weight, _ = objective.weigh(self.advantages(rollout.rewards, torch.arange(samples) // GROUP))
        units, names = objective.units(weight, GROUP), (self.seed, epoch, 0)
        if objective.noise_level:
            draws = path_steps(units, self.sigmas, 4, names)
        else:
            draws = fresh_noise(units, samples, 4, 1.0, SHAPE, names)
        order = torch.randperm(len(draws), generator=generator_for(self.seed, "order", epoch))
        frozen = {"reference": self.base, "old": self.old}
        for rows in order.tensor_split(updates):
            batch = draws.batch(rows, rollout, weight, self.condition, torch.device("cpu"))
            with torch.no_grad():
                batch = replace(batch, **{name: frozen[name](batch.noisy, batch.sigma) for name in objective.needs})
            loss, _ = objective.loss(self.policy(batch.noisy, batch.sigma), batch)
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
            self.optimizer.step()
        decay = objective.old_decay(epoch + 1, (epoch + 1) * updates)
        if decay is not None:
            for old, new in zip(self.old.parameters(), self.policy.parameters(), strict=True):
                old.data.lerp_(new.data, 1 - decay)

    @torch.no_grad()
    def _look(self, trace: Trace, samples: int) -> Tensor:
        """Samples of the policy from noise that is the same every time."""
        points = solve(self.policy, seeded_noise(list(range(samples)), SHAPE), self.sigmas)
        noise = torch.randn(points.shape, generator=torch.Generator().manual_seed(1))
        sigma = torch.linspace(0.05, 0.95, samples)
        at = add_noise(points, noise, sigma)
        drift = (self.policy(at, sigma) - self.base(at, sigma)).square().mean().item()
        flat = points.flatten(1)
        near = (flat - torch.tensor(BEST[self.landscape], dtype=torch.float)).norm(dim=1) < 1
        for curve, value in zip(
            (trace.reward, trace.entropy, trace.drift, trace.found),
            (self.reward(flat).mean().item(), entropy(flat), drift, near.float().mean().item()),
            strict=True,
        ):
            curve.append(value)
        return flat
