"""A GPU without one: torch's meta device in its place.

Tensors of the CPU are real; those of the "GPU" have shape and type, and count in its memory as long as they live. What
comes back from it is random. So what is checked is everything but the values: that tensors meet on the same device,
what is allocated, and where the program waits for the device.
"""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
DEVICE = torch.device("meta")


class StandInGPU(TorchDispatchMode):
    """`live` and `peak` count bytes on the device, `waits` the calls that make the host wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.waits: Counter[str] = Counter()
        self._sizes: dict[int, int] = {}

    def reset(self) -> int:
        """From now on the peak and the waits count; returns the bytes in use."""
        self.peak = self.live
        self.waits.clear()
        return self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = any(tensor.is_meta for tensor in tensors)
        if there and func is aten._local_scalar_dense.default:
            self.waits["item"] += 1
            return args[0].new_zeros((), device="cpu").item()
        to = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
        if func is aten._to_copy.default and to == "cpu" and there:
            self.waits["to the CPU"] += 1
            return torch.rand(args[0].shape).to(kwargs.get("dtype") or args[0].dtype)
        if func is aten._to_copy.default and to == "meta" and not there and not kwargs.get("non_blocking"):
            self.waits["to the GPU"] += 1
        strangers = [tuple(tensor.shape) for tensor in tensors if not tensor.is_meta and tensor.dim()]
        if there and strangers and func not in (aten._to_copy.default, aten.copy_.default):
            raise RuntimeError(f"{func} meets tensors of the CPU, {strangers}, on the GPU")
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            self._count(leaf)
        return result

    def _count(self, value: Any) -> None:
        if not isinstance(value, Tensor) or not value.is_meta:
            return
        storage = value.untyped_storage()
        name = storage._cdata
        if name not in self._sizes:
            self._sizes[name] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, name)

    def _free(self, name: int) -> None:
        self.live -= self._sizes.pop(name)


class FlashAttention(torch.autograd.Function):
    """What a flash kernel allocates: its output, and a float32 per query for the backward pass."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, sums = torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """A `StandInGPU` that is on, with flash attention."""
    attention = torch.nn.functional.scaled_dot_product_attention

    def on_either(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if query.is_meta and not args:
            return FlashAttention.apply(query, key, value)
        return attention(query, key, value, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", on_either)
    with StandInGPU() as made:
        yield made
