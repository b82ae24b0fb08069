"""A check at the start of a run that the loop can learn at all. Loops that cannot are common, and silent."""

from __future__ import annotations

import torch

from .errors import UserError
from .flow import add_noise, seeded_noise, velocity_target
from .policy import Policy
from .types import Batch, Condition


def check_learning(policy: Policy, objective, condition: Condition, shape: tuple[int, ...]) -> None:
    """Two updates with advantages +1 and -1 on noise, then everything restored.

    At initialisation lora_B is zero and v = v_ref, so lora_A and the penalty have exactly no gradient: lora_B must get
    one from the first backward, lora_A and the penalty from the second. An update must change the policy's velocity and
    leave the reference's. Raises UserError, which names what did not hold.
    """
    device = policy.model.device
    parameters = policy.named_parameters()
    before = [parameter.detach().clone() for _, parameter in parameters]
    batch = _batch(policy, objective.clip, condition.select(torch.zeros(2, dtype=torch.long)).to(device), shape)
    fresh = all((parameter == 0).all() for name, parameter in parameters if "lora_B" in name)
    try:
        _require(_gradient(policy, objective, batch, "lora_B") > 0, "no gradient reaches lora_B")
        with torch.no_grad():
            old = policy.velocity(batch.noisy, batch.sigma, batch.condition)
        optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 0.1)
        optimizer.step()
        _require(_gradient(policy, objective, batch, "lora_A") > 0, "no gradient reaches lora_A after an update")
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


def _batch(policy: Policy, clip: float, condition: Condition, shape: tuple[int, ...]) -> Batch:
    clean, noise = seeded_noise([1, 2, 3, 4], shape).to(policy.model.device).chunk(2)
    sigma = torch.tensor([0.5, 0.8], device=clean.device)
    noisy = add_noise(clean, noise, sigma)
    with torch.no_grad(), policy.reference():
        reference = policy.velocity(noisy, sigma, condition)
    advantage = torch.tensor([clip, -clip], device=clean.device)
    return Batch(advantage, sigma, noisy, velocity_target(clean, noise), reference, condition)


def _gradient(policy: Policy, objective, batch: Batch, part: str) -> float:
    for parameter in policy.parameters():
        parameter.grad = None
    objective.loss(policy.velocity(batch.noisy, batch.sigma, batch.condition), batch)[0].backward()
    gradients = [p.grad for name, p in policy.named_parameters() if part in name and p.grad is not None]
    return max((gradient.abs().max().item() for gradient in gradients), default=0.0)


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise UserError(f"the learning check failed: {otherwise}. The run would not have learned; nothing was trained")
