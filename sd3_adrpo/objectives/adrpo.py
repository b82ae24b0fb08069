"""ADRPO-FM: Adaptive Divergence Regularized Policy Optimization for flow matching (arXiv 2510.18053)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..objective import Objective, clipped, common_metrics, detached, squared
from ..types import Batch


@dataclass
class Adrpo(Objective):
    """Velocity loss that pulls towards good samples, pushes away from bad ones, and holds on tighter where A is low:

        loss_i = A_i |v - u|^2 + (beta0 - A_i) |v - v_ref|^2          means over C, h, w

    v is the policy's velocity, u = noise - clean that of the sample itself, v_ref the frozen base's. It equals
    beta0 |v - v*|^2 + const with v* = v_ref + (A / beta0) (u - v_ref), hence is convex in v for every A, negative ones
    too. The advantage is clipped to [-c, c] with c = clip_range * beta0. With c = beta0 the penalty's weight stays
    within [0, 2 beta0]; the paper reports under 0.4 % between clip ranges of 0.5, 1 and 2.

    Our departure from the paper: advantages are normalised over the batch by default (`advantage`), where the paper
    subtracts the mean of the prompt's own samples; `group` and `group_std` do that. `penalty` and `positive_only` are
    for ablations: a fixed beta0 |v - v_ref|^2 (curvature A + beta0 instead of beta0) or none (curvature A).
    """

    name: Literal["adrpo"] = "adrpo"  # of the objective
    beta0: float = 1.0  # weight of the pull to the base at advantage 0; larger holds on tighter
    clip_range: float = 1.0  # bound of the advantages, in units of beta0
    # a reward is measured against all of the batch, its prompt's (group, group_std), its prompt's past (running), or
    # what a regression on the prompt's embedding expects (critic)
    advantage: Literal["batch", "group", "group_std", "running", "critic"] = "batch"
    penalty: Literal["adaptive", "fixed", "none"] = "adaptive"  # beta0 - A, beta0 or 0 times |v - v_ref|^2
    positive_only: bool = False  # negative advantages become 0
    refresh_epochs: int = 0  # the penalty's reference becomes the policy every so many epochs; 0: stays the base

    def __post_init__(self) -> None:
        if not self.beta0 > 0:
            raise ValueError(f"objective.beta0 is {self.beta0}; it must be positive (the paper uses 1 for images)")
        if not self.clip_range > 0:
            raise ValueError(f"objective.clip_range is {self.clip_range}; it must be positive (in units of beta0)")
        if self.refresh_epochs < 0:
            raise ValueError(f"objective.refresh_epochs is {self.refresh_epochs}; it cannot be negative, 0 is never")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("old",) if self.refresh_epochs else ("reference",)

    def weigh(self, advantage: Tensor) -> tuple[Tensor, dict[str, float]]:
        weight, metrics = clipped(advantage, self.clip_range * self.beta0)
        return weight.clamp(min=0) if self.positive_only else weight, metrics

    def old_decay(self, epoch: int, updates: int) -> float | None:
        return 0.0 if self.refresh_epochs and epoch % self.refresh_epochs == 0 else None

    def loss(self, velocity: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        velocity, target = velocity.float(), batch.target.float()
        anchor = (batch.old if self.refresh_epochs else batch.reference).float()
        fm, w2 = squared(velocity, target), squared(velocity, anchor)
        penalty = {
            "adaptive": self.beta0 - batch.advantage,
            "fixed": torch.full_like(w2, self.beta0),
            "none": torch.zeros_like(w2),
        }[self.penalty]
        loss = (batch.advantage * fm + penalty * w2).mean()
        return loss, detached(
            loss=loss,
            fm=fm.mean(),
            fm_term=(batch.advantage * fm).mean(),
            w2_term=(penalty * w2).mean(),
            effective_beta=penalty.mean(),
            negative_beta_rate=(penalty < 0).float().mean(),
            **({"w2_old": w2.mean()} if self.refresh_epochs else {}),
            **common_metrics(velocity, batch),
        )
