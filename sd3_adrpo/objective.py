"""What the trainer asks of an objective. A new one overrides what differs from this, and writes its loss."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from .errors import UserError
from .types import Batch


class Objective:
    """A loss on velocities at noised samples, with the choice of samples and weights before it; no loop, no model.

    Dataclasses derive from it, with a `name` and an `advantage` (a kind of advantages.py) among their fields.
    """

    name: str
    advantage: str
    needs: ClassVar[tuple[str, ...]] = ("reference",)  # velocities without gradient in the batch: reference, old
    members: ClassVar[int] = 1  # samples that are judged together at the same noise: 2 for pairs
    sampled_by_old: ClassVar[bool] = False  # rollouts by the averaged weights
    noise_level: float = 0.0  # of the sampler (flow.sde_step); 0 is the ODE, which keeps no path

    def weigh(self, advantage: Tensor) -> tuple[Tensor, dict[str, float]]:
        """What the loss sees of advantages (B,) of the whole global batch, and metrics of the epoch."""
        return advantage, {}

    def units(self, advantage: Tensor, group: int) -> Tensor:
        """(U, members) rows to train on, of advantages (B,) whose `group` consecutive rows share a prompt."""
        return torch.arange(len(advantage))[:, None]

    def units_per_group(self, group: int) -> int:
        return group

    def old_decay(self, epoch: int, updates: int) -> float | None:
        """After an epoch, old = decay old + (1 - decay) policy; None leaves the old weights. Counts are those done."""
        return None

    def loss(self, velocity: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss and detached metrics. `velocity` (B, C, h, w) is the policy's at `batch.noisy`, `batch.sigma`."""
        raise NotImplementedError


def squared(first: Tensor, second: Tensor) -> Tensor:
    """|first - second|^2 as a mean over all but the batch: (B,)."""
    return (first - second).square().flatten(1).mean(1)


def clipped(advantage: Tensor, bound: float) -> tuple[Tensor, dict[str, float]]:
    return advantage.clamp(-bound, bound), {"clip_rate": (advantage.abs() > bound).float().mean().item()}


def common_metrics(velocity: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Drift from the base and growth of the velocity, where the objective computes the base's velocity."""
    if batch.reference is None:
        return {}
    reference = batch.reference.float()
    norm = velocity.flatten(1).norm(dim=1).mean() / reference.flatten(1).norm(dim=1).mean()
    return {"w2": squared(velocity, reference).mean(), "velocity_norm_ratio": norm}


def detached(**metrics: Tensor) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in metrics.items()}


def trained_samples(config: Any) -> int:
    """Of an epoch's images, how many one pass trains on, pairs counted twice."""
    units = config.rollout.prompts_per_epoch * config.objective.units_per_group(config.rollout.samples_per_prompt)
    return units * config.objective.members


def updates_per_pass(config: Any, processes: int = 1) -> int:
    """Those samples over what an update of all processes takes; every process has at least a unit in each."""
    samples, train = trained_samples(config), config.train
    updates = round(samples / (train.batch_size * train.gradient_accumulation_steps * processes))
    return max(1, min(updates, samples // config.objective.members // processes))


def check_rollout(config: Any, processes: int = 1) -> None:
    """UserError where the rollout's options cannot serve the objective on so many processes."""
    objective, rollout = config.objective, config.rollout
    units = rollout.prompts_per_epoch * objective.units_per_group(rollout.samples_per_prompt)
    if 0 < units < processes:
        raise UserError(
            f"objective {objective.name} trains on {units} samples per epoch, which are not enough for {processes} "
            "processes: raise rollout.prompts_per_epoch or rollout.samples_per_prompt"
        )
    if units < 1:
        raise UserError(
            f"objective {objective.name} compares samples of a prompt: rollout.samples_per_prompt is "
            f"{rollout.samples_per_prompt}, it must be at least 2"
        )
    guided = rollout.guidance_scale != 1 or config.train.guidance_scale != 1
    if objective.noise_level and (guided or rollout.solver != "euler"):
        raise UserError(
            f"objective {objective.name} samples an SDE without guidance: leave out rollout.guidance_scale, "
            "train.guidance_scale and rollout.solver"
        )
    steps = rollout.num_inference_steps - 1  # the last step of a path has no noise
    if objective.noise_level and config.train.sigmas_per_sample > steps:
        raise UserError(
            f"train.sigmas_per_sample is {config.train.sigmas_per_sample}, but a path of {steps + 1} steps has {steps} "
            "to train on: raise rollout.num_inference_steps or lower the former"
        )
