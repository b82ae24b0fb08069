"""DiffusionNFT (arXiv 2509.16117): contrasts a positive and a negative policy around the sampling policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..flow import predict_clean
from ..objective import Objective, common_metrics, detached, squared
from ..types import Batch


@dataclass
class DiffusionNft(Objective):
    """Flow matching of two policies that mirror each other at the sampling policy v_old, by how good the sample is:

        v+ = b v + (1 - b) v_old      v- = (1 + b) v_old - b v      r = clip(A / (2 Amax) + 1/2, 0, 1)
        loss = r |x+ - clean|^2 / m+ + (1 - r) |x- - clean|^2 / m- + kl |v - v_ref|^2

    x± = noisy - sigma v± is the clean latent that v± predicts, m± the mean of |x± - clean| without gradient. v_old is a
    moving average of the policy, decay min(rate n, limit) after n updates, and draws the samples.
    """

    name: Literal["diffusion_nft"] = "diffusion_nft"  # of the objective
    beta: float = 1.0  # b above: how far the mirrored policies lie from v_old
    kl: float = 1e-4  # weight of the distance to the base
    advantage: Literal["batch", "group", "group_std", "running", "critic"] = "group_std"  # see advantages.py
    advantage_clip: float = 5.0  # Amax above
    decay_rate: float = 0.001  # of the average, per update done
    decay_limit: float = 0.5  # of the decay
    needs = ("reference", "old")
    sampled_by_old = True

    def __post_init__(self) -> None:
        if not self.beta > 0 or not self.advantage_clip > 0:
            raise ValueError(
                f"objective.beta is {self.beta}, advantage_clip {self.advantage_clip}; both must be positive"
            )

    def weigh(self, advantage: Tensor) -> tuple[Tensor, dict[str, float]]:
        return (advantage / (2 * self.advantage_clip) + 0.5).clamp(0, 1), {}

    def old_decay(self, epoch: int, updates: int) -> float | None:
        return min(self.decay_rate * updates, self.decay_limit)

    def loss(self, velocity: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        velocity, old = velocity.float(), batch.old.float()
        clean = predict_clean(batch.noisy, batch.target, batch.sigma)

        def error(v: Tensor) -> Tensor:
            predicted = predict_clean(batch.noisy, v, batch.sigma)
            scale = (predicted - clean).abs().flatten(1).mean(1).clamp(min=1e-5).detach()
            return squared(predicted, clean) / scale

        positive = error(old + self.beta * (velocity - old))
        negative = error(old - self.beta * (velocity - old))
        w2 = squared(velocity, batch.reference.float())
        loss = (batch.advantage * positive + (1 - batch.advantage) * negative + self.kl * w2).mean()
        return loss, detached(
            loss=loss, positive=positive.mean(), negative=negative.mean(), **common_metrics(velocity, batch)
        )
