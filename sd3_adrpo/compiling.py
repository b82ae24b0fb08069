"""torch.compile of the transformer's blocks (regional: a block compiles once for all its equals), or a warning."""

from __future__ import annotations

import logging
from contextlib import nullcontext

import torch

from .fp8 import in_float8
from .policy import Policy
from .types import Condition

logger = logging.getLogger(__name__)
VARIANTS = 64  # kinds of block x batch shapes x (adapters on, off) x (with gradient, without); torch gives up at 8


def compile_blocks(
    policy: Policy,
    condition: Condition,
    shape: tuple[int, ...],
    batch_size: int,
    fp8: bool = False,
    backend: str = "inductor",
) -> bool:
    """Whether it worked: a forward and a backward pass are tried at once, with `condition`'s first row.

    Shapes are fixed, so each batch size compiles once: keep the last batch of a rollout whole. What cannot be compiled
    (no compiler on this computer, an unsupported GPU) runs as before, with a warning.
    """
    blocks = policy.model.transformer.transformer_blocks
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    for block in blocks:
        block.compile(backend=backend, dynamic=False)
    try:
        _try(policy, condition, shape, batch_size, fp8)
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


def _try(policy: Policy, condition: Condition, shape: tuple[int, ...], batch_size: int, fp8: bool) -> None:
    device = policy.model.device
    rows = condition.select(torch.zeros(batch_size, dtype=torch.long)).to(device)
    noisy, sigma = torch.zeros(batch_size, *shape, device=device), torch.full((batch_size,), 0.5, device=device)
    with policy.merged(), in_float8(policy.model.transformer) if fp8 else nullcontext():
        policy.velocity(noisy, sigma, rows)
    policy.velocity(noisy, sigma, rows).float().square().mean().backward()
