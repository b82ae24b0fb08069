"""Sampling with the LoRA folded into the frozen weights: one matrix product per layer instead of three.

The merged weight W + (alpha / r) B A is added up in float32 and rounded once to W's type. In float32 its velocities
equal the adapters' to rounding, 1e-5 of their norm. In bfloat16, whose steps are larger than what a LoRA learns first,
rounding to the nearest would give W back; so it is rounded up or down in proportion (`dithered`). docs/performance.md
says how far that moves a velocity, against what bfloat16 arithmetic does to it anyway.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer


@contextmanager
def merged(layers: Sequence[BaseTunerLayer], adapter: str) -> Iterator[None]:
    """The layers compute with merged weights and no adapters; then the very same frozen tensors come back.

    Costs a second copy of the adapted layers' weights while it lasts (0.9 GB for SD3.5-medium's defaults in bfloat16).
    """
    frozen: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
    disabled = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            weight = layer.get_base_layer().weight
            total = weight.data.float() + layer.get_delta_weight(adapter).detach().float()
            frozen.append((weight, weight.data))
            weight.data = dithered(total) if weight.dtype == torch.bfloat16 else total.to(weight.dtype)
            layer._disable_adapters = True
        yield
    finally:
        for weight, original in frozen:
            weight.data = original
        for layer, flag in zip(layers, disabled, strict=True):
            layer._disable_adapters = flag


def dithered(values: torch.Tensor) -> torch.Tensor:
    """float32 to bfloat16, up or down with a chance that makes the mean right; what bfloat16 has exactly stays.

    The chances are a fixed hash of a value's place, so the same weights give the same images, on any device.
    """
    place = torch.arange(values.numel(), dtype=torch.int32, device=values.device)
    for factor, shift in ((0x3C6EF372, 15), (0x5BD1E995, 13)):
        place = place * factor  # int32 wraps around
        place = place ^ (place >> shift)
    bits = values.contiguous().view(torch.int32).flatten() + (place & 0xFFFF)  # carries into the bits that are kept
    return (bits & -0x10000).view(torch.float32).view_as(values).bfloat16()
