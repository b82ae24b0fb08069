"""Weights in shards, one per process: FSDP2 (torch.distributed.fsdp.fully_shard), as accelerate's config file asks.

accelerate launches and names the options; the sharding itself is done here. Its own wrapper rounds every input to the
weights' type, the time among them, and does not know CPUs.
Sampling, measuring and frozen velocities take all weights at once (`gathered`): then a forward pass communicates
nothing, and processes may make different numbers of them. Only training passes gather block by block.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from .errors import UserError


def asked_to_shard(processes: int) -> bool:
    """Whether accelerate's config says so and there is more than one process. UserError for what is not supported."""
    option = {name: os.environ.get(name, "false").lower() for name in ("ACCELERATE_USE_FSDP", "FSDP_OFFLOAD_PARAMS")}
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise UserError(
            "the accelerate config asks for DeepSpeed, which is not supported: use docs/accelerate/fsdp2.yaml, with "
            "fsdp_reshard_after_forward: false for what ZeRO-2 does"
        )
    if option["ACCELERATE_USE_FSDP"] != "true" or processes == 1:
        return False
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError(f"fsdp_version is {os.environ.get('FSDP_VERSION', '1')}; only 2 is supported")
    if option["FSDP_OFFLOAD_PARAMS"] == "true":
        raise UserError("fsdp_offload_params is true; it is not supported: leave it out, or use more processes")
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # transformers would load encoders on one process only
    return True


def shard(transformer: nn.Module, compute: torch.dtype, whole: Iterable[nn.Parameter] = ()) -> None:
    """Shards the weights, but for those in `whole`, a group per block. They compute in the type `compute`.

    Gradients are summed over the processes in float32.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    options: dict[str, Any] = {"mp_policy": policy, "ignored_params": set(whole), "reshard_after_forward": _reshards()}
    for block in transformer.transformer_blocks:
        fully_shard(block, **options)
    fully_shard(transformer, **options)
    for module in _shards(transformer):
        module.set_gradient_divide_factor(1.0)  # a sum: the loss is divided by the samples of all processes
        module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum


def _shards(module: nn.Module) -> list[FSDPModule]:
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def _reshards() -> bool:
    """Whether weights are given back between forward and backward (ZeRO-3) or kept (ZeRO-2)."""
    return os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true"


@contextmanager
def gathered(transformer: nn.Module) -> Iterator[None]:
    """Every process has all weights, as plain tensors in the computing type; all must enter. No gradients within."""
    parts = _shards(transformer)
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(_reshards(), recurse=False)


def joined(state: Any, keep: bool) -> Any:
    """`state`, any nest of lists and dicts, with shards put together on the CPU. All must call; who `keep`s gets it."""

    def join(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        full = value.detach().full_tensor()
        return full.cpu() if keep else None

    return tree_map(join, state)


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """This process's shard of `value` where the parameter is sharded, else `value` itself."""
    if not isinstance(parameter, DTensor) or value.dim() == 0:
        return value
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
