"""The policy of `--finetune full`: every weight of the transformer is trained, the reference is a second copy of it.

The transformer computes in its own type, as with a LoRA. Below float32 each weight has a float32 master: gradients are
added up in it, AdamW moves it, and after every step it is rounded into the transformer (as in arXiv 1710.03740). Bytes
per weight with bfloat16: 2 transformer, 2 reference, 4 master, 4 gradient, 8 AdamW. In float32 the transformer is its
own master. Sharded by FSDP2 (sharding.py) the masters are the shards, and FSDP rounds what it gathers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from .models.sd3 import SD3
from .policy import Policy
from .sharding import joined, shard


class FullPolicy(Policy):
    """Velocities under the trained and under the frozen weights; the same face as the LoRA's `Policy`."""

    gradients = ("", "")  # all from the first

    def __init__(self, model: SD3, gradient_checkpointing: bool = False, sharded: bool = False) -> None:
        self.model, self._layers, self._old = model, [], None
        transformer = model.transformer.eval()
        self.frozen = copy.deepcopy(transformer).requires_grad_(False)
        if gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        transformer.requires_grad_(True)
        if sharded:
            for parameter in transformer.parameters():
                parameter.data = parameter.data.float()
            shard(transformer, model.dtype)
        self._working = list(transformer.parameters())
        self._masters = dict(transformer.named_parameters())
        self._rounds = not sharded and model.dtype != torch.float32
        if self._rounds:
            self._masters = {name: nn.Parameter(p.detach().float()) for name, p in self._masters.items()}
            for weight, master in zip(self._working, self._masters.values(), strict=True):
                weight.register_post_accumulate_grad_hook(partial(_move_gradient, master))

    @property
    def check_step(self) -> float:
        """A step that 16 bits can show: 1 % of the weights' norm."""
        return 0.01 * joined(torch.nn.utils.get_total_norm(self.parameters()), True).item()

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return list(self._masters.items())

    @torch.no_grad()
    def updated(self) -> None:
        if self._rounds:
            torch._foreach_copy_(self._working, self.parameters())

    @contextmanager
    def reference(self) -> Iterator[None]:
        trained, self.model.transformer = self.model.transformer, self.frozen
        try:
            yield
        finally:
            self.model.transformer = trained

    @contextmanager
    def old(self) -> Iterator[None]:
        """The averaged weights in the transformer. They lie on the CPU, or are sharded as the trained ones are."""
        if self._old is None:
            self.update_old(0.0)
        trained = self.parameters() if self._rounds else [weight.detach().clone() for weight in self._working]
        try:
            self._write(self._old)
            yield
        finally:
            self._write(trained)

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        for weight, value in zip(self._working, values, strict=True):
            weight.copy_(value)

    @torch.no_grad()
    def update_old(self, decay: float) -> None:
        current = [p.detach() if self.sharded else p.detach().cpu() for p in self.parameters()]
        if self._old is None:
            self._old = [value.clone() for value in current]  # on a CPU, `.cpu()` is the weight itself
        for old, value in zip(self._old, current, strict=True):
            old.lerp_(value, 1 - decay)


def _move_gradient(master: nn.Parameter, weight: nn.Parameter) -> None:
    """Called when `weight.grad` is whole: sums of 16-bit gradients would lose the small ones."""
    master.grad = weight.grad.float() if master.grad is None else master.grad.add_(weight.grad)
    weight.grad = None
