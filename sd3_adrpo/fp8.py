"""Sampling with the blocks' matrix products in float8 (e4m3), which GPUs from Ada and Hopper on multiply twice as fast.

    y = (x / s_x) (W / s_w)^T s_x s_w + b,    s = max|row| / 448, of each token's x and of each output's W

Attention, norms, modulation and everything outside the blocks stay in the model's type. What is sampled then comes
from a slightly other policy than the one that is trained: docs/performance.md says by how much. Rounding x costs passes
over memory that torch.compile fuses; without `compile` they eat much of what the products win.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Config
from .errors import UserError

LARGEST = 448.0  # of float8_e4m3fn
MULTIPLE = 16  # of both sides of a weight: what the kernels take


def check(config: Config) -> None:
    """Raises UserError where float8 rollouts cannot work."""
    if config.train.mixed_precision != "bf16":
        raise UserError(
            "rollout.fp8 computes in bfloat16 around its products: train.mixed_precision bf16, not "
            f"{config.train.mixed_precision}"
        )
    if config.objective.noise_level:
        raise UserError(
            f"rollout.fp8 does not go with --objective {config.objective.name}, which trains on the probabilities of "
            "the very steps that were sampled: leave it out"
        )
    if not hasattr(F, "scaled_mm"):
        raise UserError(
            f"rollout.fp8 needs torch.nn.functional.scaled_mm, which torch {torch.__version__} has not: 2.10"
        )
    if torch.cuda.is_available() and (found := torch.cuda.get_device_capability()) < (8, 9):
        raise UserError(
            f"rollout.fp8 needs a GPU of compute capability 8.9 (Ada, Hopper) or more; {torch.cuda.get_device_name()} "
            f"has {found[0]}.{found[1]}: leave it out"
        )


@contextmanager
def in_float8(transformer: nn.Module) -> Iterator[None]:
    """The blocks' attention and feed-forward layers compute in float8, with the weights that they have on entering.

    Costs a copy of those weights, one byte each. Adapters, where they are not merged, keep their type. No gradients.
    """
    layers = [layer for name, layer in transformer.transformer_blocks.named_modules() if _fits(name, layer)]
    try:
        for layer in layers:
            layer.forward = _forward(layer)  # before the class's, until it is deleted
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _fits(name: str, layer: nn.Module) -> bool:
    inside = isinstance(layer, nn.Linear) and ".norm" not in name and "lora_" not in name
    return inside and layer.in_features % MULTIPLE == 0 and layer.out_features % MULTIPLE == 0


def _forward(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    with torch.no_grad():
        weight, weight_scale = rounded(layer.weight)
    rows = F.ScalingType.RowWise

    def forward(x: Tensor) -> Tensor:
        low, scale = rounded(x.flatten(0, -2))
        y = F.scaled_mm(low, weight.t(), scale, rows, weight_scale.t(), rows, bias=layer.bias, output_dtype=x.dtype)
        return y.view(*x.shape[:-1], -1)

    return forward


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (N, D) -> x / s in float8 (N, D) and s (N, 1) in float32. Zeros stay zeros."""
    inverse = (LARGEST / x.abs().amax(-1, keepdim=True).float().clamp_min(1e-12)).to(x.dtype)
    return (x * inverse).to(torch.float8_e4m3fn), inverse.float().reciprocal()
