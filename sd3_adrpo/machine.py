"""How fast this machine multiplies and how much it remembers. torch loads when first asked."""

from __future__ import annotations

import os
import time


def matrix_speed(kind: str, precision: str) -> float:
    """FLOP per second of a large matrix product; takes well under a second."""
    import torch

    from .types import DTYPES

    size = 8192 if kind == "cuda" else 512
    a = torch.randn(size, size, device=kind, dtype=DTYPES[precision])
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        b = a @ a
        if kind == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    del a, b
    if kind == "cuda":
        torch.cuda.empty_cache()
    return 2 * size**3 / min(seconds)


def installed_memory() -> tuple[str, int]:
    """Of what, and bytes; 0 where the system does not say."""
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return properties.name, properties.total_memory
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return "this computer", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return "this computer", 0
