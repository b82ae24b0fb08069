"""The policy: LoRA on the frozen transformer. The reference is the same transformer with its adapters off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from .config import LoraConfig
from .errors import UserError
from .lora_forward import speed_up
from .merging import merged
from .models.sd3 import SD3
from .sharding import gathered, joined, like, shard
from .types import Condition

ADAPTER = "policy"


class Policy:
    """Velocities under the trained and under the frozen weights, without a second copy of the model."""

    _merged = False
    gradients = ("lora_B", "lora_A")  # names of what must get one from the first backward, and from the second
    check_step = 0.1  # length of the step that canary.py makes

    def __init__(
        self, model: SD3, lora: LoraConfig, gradient_checkpointing: bool = False, sharded: bool = False
    ) -> None:
        self.model = model
        transformer = model.transformer.requires_grad_(False).eval()  # SD3 has no dropout: eval only says so
        config = peft.LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, init_lora_weights="gaussian", target_modules=list(lora.target_modules)
        )
        try:
            transformer.add_adapter(config, adapter_name=ADAPTER)
        except ValueError as error:
            raise UserError(f"lora.target_modules: {error}") from error
        for parameter in self.parameters():  # small updates round away in bf16
            parameter.data = parameter.data.float()
        if gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        self._old: list[Tensor] | None = None
        self._layers = [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]
        for layer in self._layers:
            speed_up(layer, ADAPTER)
        if sharded:  # the frozen weights; the adapters are small
            shard(transformer, model.dtype, self.parameters())

    def parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for _, parameter in self.named_parameters()]

    def named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        named = self.model.transformer.named_parameters()
        return [(name, parameter) for name, parameter in named if f".{ADAPTER}." in name]

    @property
    def sharded(self) -> bool:
        return isinstance(self.model.transformer, FSDPModule)

    def gathered(self) -> AbstractContextManager:
        """With sharded weights: all of them on every process, for sampling. Enter it last, and on all processes."""
        return gathered(self.model.transformer)

    def updated(self) -> None:
        """To be called when the trained weights have changed."""

    def velocity(self, noisy: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """v (B, C, h, w) of the policy, or of the reference within `reference()`."""
        return self.model.velocity(noisy, sigma, condition)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Adapters off. diffusers' `disable_adapters` would also toggle `requires_grad`: no gradients, in silence."""
        if self._merged:
            raise RuntimeError("the LoRA is merged into the base: leave merged() before asking for the reference")
        before = [layer._disable_adapters for layer in self._layers]
        for layer in self._layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer, disabled in zip(self._layers, before, strict=True):
                layer._disable_adapters = disabled

    @contextmanager
    def old(self) -> Iterator[None]:
        """The averaged weights (`update_old`) in place of the trained ones."""
        if self._old is None:
            self.update_old(0.0)
        parameters = self.parameters()
        current = [parameter.data for parameter in parameters]
        for parameter, value in zip(parameters, self._old, strict=True):
            parameter.data = value
        try:
            yield
        finally:
            for parameter, value in zip(parameters, current, strict=True):
                parameter.data = value

    @torch.no_grad()
    def update_old(self, decay: float) -> None:
        """old = decay old + (1 - decay) policy; the first time a copy of the policy."""
        current = [parameter.detach() for parameter in self.parameters()]
        if self._old is None:
            self._old = [value.clone() for value in current]
        torch._foreach_lerp_(self._old, current, 1 - decay)

    @contextmanager
    def merged(self) -> Iterator[None]:
        """The policy without the price of its adapters, for sampling: see merging.py. No gradients within."""
        if self._merged:
            raise RuntimeError("the LoRA is merged into the base already")
        self._merged = True
        try:
            with torch.no_grad(), merged(self._layers, ADAPTER):
                yield
        finally:
            self._merged = False

    def state_dict(self, keep: bool = True) -> dict[str, Tensor]:
        """The trained weights. All processes must call it; of sharded ones only those that `keep` it get the values."""
        return joined({name: parameter.detach() for name, parameter in self.named_parameters()}, keep)

    def old_state(self, keep: bool = True) -> list[Tensor] | None:
        return joined(self._old, keep)

    def load_old_state(self, state: list[Tensor] | None) -> None:
        self._old = None
        if state is not None:
            self.update_old(0.0)  # where and how they lie
            for old, value in zip(self._old, state, strict=True):
                old.copy_(like(value, old))

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        named = dict(self.named_parameters())
        if named.keys() != state.keys():
            different = sorted(named.keys() ^ state.keys())
            raise UserError(
                f"the checkpoint has other trained weights ({len(different)} differ, e.g. {different[0]}): "
                "resume with the run's own finetune and lora options"
            )
        for name, parameter in named.items():
            if parameter.shape != state[name].shape:
                raise UserError(
                    f"{name} is {tuple(state[name].shape)} in the checkpoint, {tuple(parameter.shape)} here"
                )
            parameter.copy_(like(state[name], parameter))
        self.updated()
