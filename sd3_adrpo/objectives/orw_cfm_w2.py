"""ORW-CFM-W2: online reward-weighted flow matching with a W2 penalty (arXiv 2502.06061)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..objective import Objective, common_metrics, detached, squared
from ..types import Batch


@dataclass
class OrwCfmW2(Objective):
    """Flow matching with exponential weights, and one fixed penalty for all samples:

        loss_i = w_i |v - u|^2 + alpha |v - v_ref|^2          w = exp(tau R) / mean exp(tau R)

    Our departure: R is standardised (`advantage`), so that tau means the same for every reward; in points of
    100 x cosine the weights would be winner-take-all. `effective_samples` logs the share of samples that count,
    (sum w)^2 / (n sum w^2).
    """

    name: Literal["orw_cfm_w2"] = "orw_cfm_w2"  # of the objective
    tau: float = 0.5  # inverse temperature, per standard deviation of the reward
    alpha: float = 1.0  # weight of the penalty
    advantage: Literal["batch", "group", "group_std", "running", "critic"] = "batch"  # the standardised R

    def __post_init__(self) -> None:
        if not self.tau > 0 or self.alpha < 0:
            raise ValueError(f"objective.tau is {self.tau}, it must be positive; alpha is {self.alpha}, at least 0")

    def weigh(self, advantage: Tensor) -> tuple[Tensor, dict[str, float]]:
        weight = (self.tau * (advantage - advantage.max())).exp()
        weight = weight / weight.mean()
        return weight, {"effective_samples": (1 / weight.square().mean()).item()}

    def loss(self, velocity: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        velocity = velocity.float()
        fm, w2 = squared(velocity, batch.target.float()), squared(velocity, batch.reference.float())
        loss = (batch.advantage * fm + self.alpha * w2).mean()
        return loss, detached(loss=loss, fm=fm.mean(), **common_metrics(velocity, batch))
