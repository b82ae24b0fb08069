"""A check at the start of a run that the loop can learn at all. Loops that cannot are common, and silent."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from .draws import Draws
from .errors import UserError
from .flow import seeded_noise
from .objective import Objective
from .policy import Policy
from .sharding import joined
from .types import Batch, Condition, Rollout


def check_learning(policy: Policy, objective: Objective, condition: Condition, shape: tuple[int, ...]) -> None:
    """Two updates with advantages +1 and -1 on noise, then everything restored.

    At initialisation lora_B is zero and v = v_ref, so lora_A and the penalty have exactly no gradient: lora_B must get
    one from the first backward, lora_A and the penalty from the second; without a LoRA, all weights from both. An
    update must change the policy's velocity and leave the reference's. Raises UserError, which names what did not hold.
    """
    parameters = policy.named_parameters()
    before = [parameter.detach().clone() for _, parameter in parameters]
    batch = _batch(policy, objective, condition, shape)
    fresh = all((parameter == 0).all() for name, parameter in parameters if "lora_B" in name)
    try:
        first, second = policy.gradients
        _require(_gradient(policy, objective, batch, first) > 0, f"no gradient reaches {first or 'the weights'}")
        with torch.no_grad():
            old = policy.velocity(batch.noisy, batch.sigma, batch.condition)
        norm = joined(torch.nn.utils.clip_grad_norm_(policy.parameters(), math.inf), True).item()
        torch.optim.SGD(policy.parameters(), lr=policy.check_step / norm).step()
        policy.updated()
        _require(
            _gradient(policy, objective, batch, second) > 0,
            f"no gradient reaches {second or 'the weights'} after an update",
        )
        with torch.no_grad():
            new = policy.velocity(batch.noisy, batch.sigma, batch.condition)
            with policy.reference():
                reference = policy.velocity(batch.noisy, batch.sigma, batch.condition)
        _require(not torch.equal(new, old), "an update does not change the policy's velocity")
        _require(torch.equal(reference, batch.reference), "an update changes the reference's velocity")
        _require(not fresh or torch.equal(old, batch.reference), "the untrained policy differs from its reference")
    finally:
        with torch.no_grad():
            for (_, parameter), value in zip(parameters, before, strict=True):
                parameter.copy_(value)
                parameter.grad = None
        policy.updated()


def _batch(policy: Policy, objective: Objective, condition: Condition, shape: tuple[int, ...]) -> Batch:
    """Two samples of one prompt, the first better than the second."""
    path = seeded_noise([1, 2, 3, 4, 5, 6], shape).unflatten(0, (2, 3))  # of two steps, for objectives on paths
    rewards = torch.tensor([1.0, -1.0])
    rollout = Rollout(torch.zeros(2, dtype=torch.long), path[:, -1], rewards, path=path, velocity=path[:, 1:] * 0)
    weight, _ = objective.weigh(rewards)
    units = objective.units(weight, 2)
    sigma, noise = torch.tensor([0.5, 0.8])[: len(units), None], seeded_noise([7, 8], (1, *shape))[: len(units)]
    draws = Draws(units, sigma, noise)
    if objective.noise_level:
        draws = Draws(units, sigma, None, torch.zeros(len(units), 1, dtype=torch.long), sigma - 0.1)
    rows, device = torch.arange(len(units)), policy.model.device
    batch = draws.batch(rows, rollout, weight, condition, device)
    with torch.no_grad(), policy.reference():
        reference = policy.velocity(batch.noisy, batch.sigma, batch.condition)
    return replace(batch, reference=reference, old=reference)


def _gradient(policy: Policy, objective: Objective, batch: Batch, part: str) -> float:
    for parameter in policy.parameters():
        parameter.grad = None
    objective.loss(policy.velocity(batch.noisy, batch.sigma, batch.condition), batch)[0].backward()
    gradients = [p.grad for name, p in policy.named_parameters() if part in name and p.grad is not None]
    return max((joined(gradient.abs().max(), True).item() for gradient in gradients), default=0.0)


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise UserError(f"the learning check failed: {otherwise}. The run would not have learned; nothing was trained")
