"""torch.compile of the transformer's blocks (regional: a block compiles once for all its equals), or a warning."""

from __future__ import annotations

import logging
from contextlib import nullcontext

import torch
from torch import Tensor

from .fp8 import in_float8
from .policy import Policy
from .types import Condition

logger = logging.getLogger(__name__)
VARIANTS = 64  # kinds of block x batch shapes x (adapters on, off) x (with gradient, without); torch gives up at 8


def compile_blocks(
    policy: Policy,
    condition: Condition,
    shape: tuple[int, ...],
    sampled: int,
    trained: int,
    fp8: bool = False,
    backend: str = "inductor",
) -> bool:
    """Whether it worked; tried at once on a forward pass of `sampled` rows and one of `trained` rows with its backward.

    Shapes are fixed, so each number of rows compiles once: keep the last batch of a rollout whole. What cannot be
    compiled (no compiler on this computer, an unsupported GPU) runs as before, with a warning.
    """
    blocks = policy.model.transformer.transformer_blocks
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    for block in blocks:
        block.compile(backend=backend, dynamic=False)
    try:
        _try(policy, condition, shape, sampled, trained, fp8)
    except Exception as error:  # compilers fail in every way there is
        for block in blocks:
            block._compiled_call_impl = None
        torch._dynamo.reset()
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        logger.warning("compile is off, torch.compile failed here: %s", first)
        return False
    finally:
        for parameter in policy.parameters():
            parameter.grad = None
    return True


def _try(policy: Policy, condition: Condition, shape: tuple[int, ...], sampled: int, trained: int, fp8: bool) -> None:
    device = policy.model.device

    def velocity(rows: int) -> Tensor:
        noisy, sigma = torch.zeros(rows, *shape, device=device), torch.full((rows,), 0.5, device=device)
        return policy.velocity(noisy, sigma, condition.select(torch.zeros(rows, dtype=torch.long)).to(device))

    with policy.merged(), in_float8(policy.model.transformer) if fp8 else nullcontext():
        velocity(sampled)
    velocity(trained).float().square().mean().backward()
