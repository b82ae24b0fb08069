"""AWM: advantage weighted matching (arXiv 2509.25050), policy gradients with the matching loss as likelihood."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..objective import Objective, clipped, common_metrics, detached, squared
from ..types import Batch


@dataclass
class Awm(Objective):
    """PPO's clipped surrogate, the ratio from matching errors at the same noise and sigma, held near two policies:

        loss = -min(r A, clip(r, 1 - e, 1 + e) A) + kl |v - v_ref|^2 + kl_old |v - v_old|^2
        r = exp(fm_old - fm)      fm = |v - u|^2, mean over C, h, w

    v_old is a moving average of the policy. Our departures: it serves both the ratio and the second distance, where
    the authors' code keeps another copy for off-policy samples; and fm is the plain error, where their best runs take
    a power of it that flattens large errors.
    """

    name: Literal["awm"] = "awm"  # of the objective
    clip_range: float = 1.0  # of the ratio; 1 is the authors' and hardly ever acts
    kl: float = 1e-3  # weight of the distance to the base
    kl_old: float = 1.0  # weight of the distance to the moving average
    old_average: float = 0.3  # share of the average that an epoch keeps
    advantage: Literal["batch", "group", "group_std", "running", "critic"] = "group_std"  # see advantages.py
    advantage_clip: float = 5.0  # bound of the advantages
    needs = ("reference", "old")

    def __post_init__(self) -> None:
        if not self.clip_range > 0 or not self.advantage_clip > 0:
            values = f"objective.clip_range is {self.clip_range}, advantage_clip {self.advantage_clip}"
            raise ValueError(f"{values}; both must be positive")

    def weigh(self, advantage: Tensor) -> tuple[Tensor, dict[str, float]]:
        return clipped(advantage, self.advantage_clip)

    def old_decay(self, epoch: int, updates: int) -> float | None:
        return self.old_average

    def loss(self, velocity: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        velocity, target = velocity.float(), batch.target.float()
        old, reference = batch.old.float(), batch.reference.float()
        fm = squared(velocity, target)
        ratio = (squared(old, target) - fm).exp()
        bounded = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
        surrogate = torch.minimum(ratio * batch.advantage, bounded * batch.advantage)
        distance = self.kl * squared(velocity, reference) + self.kl_old * squared(velocity, old)
        loss = (distance - surrogate).mean()
        return loss, detached(
            loss=loss,
            fm=fm.mean(),
            ratio_clip_rate=(ratio != bounded).float().mean(),
            **common_metrics(velocity, batch),
        )
