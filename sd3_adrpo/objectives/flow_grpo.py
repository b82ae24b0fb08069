"""Flow-GRPO (arXiv 2505.05470): policy gradients through the steps of a stochastic sampler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..flow import sde_step
from ..objective import Objective, clipped, common_metrics, detached, squared
from ..types import Batch

ENTRIES = 65536  # latent entries for which the paper's clip range was tuned


@dataclass
class FlowGrpo(Objective):
    """PPO's clipped surrogate over the Gaussian steps of the sampler (flow.sde_step), with a KL to the base:

        loss = -min(r A, clip(r, 1 - e, 1 + e) A) + kl |mu - mu_ref|^2 / (2 std^2)     r = exp(log p - log p_old)

    log p is the mean over the latent's entries, as in the paper's code. A mean's log-ratio scales with
    1 / sqrt(entries), so e = clip_range sqrt(65536 / entries). The KL is the Gaussians' own, per entry; the paper's
    code leaves the step's length out of std. `train.sigmas_per_sample` steps of each path are trained on per pass, at
    the path's own sigmas: `train.sigma_shift` and `sigma_max` mean nothing here.
    """

    name: Literal["flow_grpo"] = "flow_grpo"  # of the objective
    noise_level: float = 0.7  # of the sampler; 0 would be the ODE, which has no probabilities
    clip_range: float = 1e-4  # of the ratio, for a latent of 65536 entries
    kl: float = 0.04  # weight of the KL to the base
    advantage: Literal["batch", "group", "group_std", "running", "critic"] = "group_std"  # see advantages.py
    advantage_clip: float = 5.0  # bound of the advantages

    def __post_init__(self) -> None:
        for name in ("noise_level", "clip_range", "advantage_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"objective.{name} is {getattr(self, name)}; it must be positive")

    def weigh(self, advantage: Tensor) -> tuple[Tensor, dict[str, float]]:
        return clipped(advantage, self.advantage_clip)

    def loss(self, velocity: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        velocity = velocity.float()

        def mean(v: Tensor) -> Tensor:
            return sde_step(batch.noisy, v.float(), batch.sigma, batch.next_sigma, self.noise_level)[0]

        ours = mean(velocity)
        _, std = sde_step(batch.noisy, velocity.detach(), batch.sigma, batch.next_sigma, self.noise_level)
        variance = std.square().flatten()  # (B,)
        log_ratio = (squared(batch.next_noisy, mean(batch.old)) - squared(batch.next_noisy, ours)) / (2 * variance)
        ratio, bound = log_ratio.exp(), self.clip_range * (ENTRIES / velocity[0].numel()) ** 0.5
        surrogate = torch.minimum(ratio * batch.advantage, ratio.clamp(1 - bound, 1 + bound) * batch.advantage)
        kl = squared(ours, mean(batch.reference)) / (2 * variance)
        loss = (self.kl * kl - surrogate).mean()
        return loss, detached(
            loss=loss,
            kl=kl.mean(),
            ratio_clip_rate=((ratio - 1).abs() > bound).float().mean(),
            **common_metrics(velocity, batch),
        )
