"""Where an update looks: the noise that each sample is trained at, and the frozen velocities there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .flow import add_noise, seeded_noise, stratified_sigmas, velocity_target
from .seeds import generator_for, seed_for
from .types import Batch, Condition, Rollout


@dataclass
class Draws:
    """D draws for each of U units; a unit is `members` samples that share sigma and noise."""

    units: Tensor  # (U, members) rows of the rollout
    sigma: Tensor  # (U, D)
    noise: Tensor | None  # (U, D, C, h, w)
    step: Tensor | None = None  # (U, D) of the rollout's path, where the objective trains on its steps
    next_sigma: Tensor | None = None  # (U, D)
    frozen: dict[str, Tensor] = field(default_factory=dict)  # name -> velocities (U, D, members, C, h, w)

    def __len__(self) -> int:
        return len(self.units)

    def batch(
        self,
        rows: Tensor,
        rollout: Rollout,
        advantage: Tensor,
        condition: Condition,
        device: torch.device,
        negative: Condition | None = None,
    ) -> Batch:
        """All draws of the units `rows`, by unit, draw and member."""
        draws, members = self.sigma.shape[1], self.units.shape[1]
        samples = self.units[rows].repeat_interleave(draws, dim=0).flatten()  # (B,)

        def there(values: Any) -> Any:  # a GPU still at work on the last batch is not waited for
            return values.to(device, non_blocking=device.type != "mps")

        def spread(values: Tensor) -> Tensor:  # (U, D, ...) -> (B, ...)
            return there(values[rows].flatten(0, 1).repeat_interleave(members, dim=0))

        clean, sigma = there(rollout.clean[samples]), spread(self.sigma)
        more = {name: there(values[rows].flatten(0, 2)) for name, values in self.frozen.items()}
        if self.step is None:
            noise = spread(self.noise)
            noisy, target = add_noise(clean, noise, sigma), velocity_target(clean, noise)
        else:
            step = self.step[rows].flatten().repeat_interleave(members)
            noisy = there(rollout.path[samples, step])
            target = velocity_target(clean, there(rollout.path[samples, 0]))
            more["next_noisy"] = there(rollout.path[samples, step + 1])
            more["next_sigma"] = spread(self.next_sigma)
            more["old"] = there(rollout.velocity[samples, step])
        return Batch(
            advantage=there(advantage[samples]),
            sigma=sigma,
            noisy=noisy,
            target=target,
            condition=there(condition.select(rollout.prompt[samples])),
            negative=None if negative is None else there(negative.select(rollout.prompt[samples])),
            **{"reference": None, **more},
        )


def fresh_noise(
    units: Tensor,
    samples: int,
    draws: int,
    shift: float,
    shape: tuple[int, ...],
    names: tuple,
    highest: float = 1.0,
) -> Draws:
    """Sigmas and noise by the number of a unit's first sample among all `samples`, whatever batch or process it is in.

    `names` name the draw (seeds.py).
    """
    first = units[:, 0]
    sigma = stratified_sigmas(samples, draws, shift, generator_for(*_named("sigma", names)), highest)[first]
    seeds = [seed_for(*_named("noise", names), number) for number in first.tolist()]
    return Draws(units, sigma, seeded_noise(seeds, (draws, *shape)))


def path_steps(units: Tensor, sigmas: Tensor, draws: int, names: tuple) -> Draws:
    """For each unit `draws` different steps of its path, never the last, which has no noise."""
    steps = len(sigmas) - 2
    chosen = [
        torch.randperm(steps, generator=generator_for(*_named("sigma", names), number))[:draws]
        for number in units[:, 0].tolist()
    ]
    step = torch.stack(chosen)
    return Draws(units, sigmas[step], None, step, sigmas[step + 1])


def _named(kind: str, names: tuple) -> tuple:
    """(seed, epoch, inner) -> (seed, kind, epoch, inner)."""
    return (names[0], kind, *names[1:])
