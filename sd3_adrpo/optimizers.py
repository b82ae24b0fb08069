"""Gradients -> weights: the optimiser, its moments in 8 bits where memory is short, its schedule and loss scale."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import Tensor
from torch.distributed.tensor import DTensor

from .config import TrainConfig
from .errors import UserError
from .parallel import sum_gradients
from .policy import Policy
from .sharding import joined, like

OPTIONS = ("initial_lr", "betas", "eps", "weight_decay")  # of the optimiser; a run that goes on may be given others


def make_optimizer(parameters: Iterable[torch.nn.Parameter], train: TrainConfig) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101) with moments of 4 bytes each, or of 1 byte and a scale per 256 (arXiv 2110.02861).

    UserError where torchao, which holds the 8-bit one, is missing or does not fit the installed torch.
    """
    options = {
        "lr": train.learning_rate,
        "betas": (train.adam_beta1, train.adam_beta2),
        "weight_decay": train.adam_weight_decay,
        "eps": train.adam_epsilon,
    }
    if train.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **options)
    try:
        from torchao.optim import AdamW8bit  # late: it takes seconds
    except ImportError as error:
        raise UserError(
            f"train.optimizer adamw_8bit needs torchao, which does not import here ({error}): "
            "pip install -e '.[lowbit]', or take adamw"
        ) from error
    return AdamW8bit(parameters, **options)


class Optimization:
    """Updates a policy's weights `total` times, at the rates of a schedule."""

    def __init__(self, policy: Policy, train: TrainConfig, total: int, accelerator: Accelerator) -> None:
        self.policy, self.max_norm, self.accelerator = policy, train.max_grad_norm, accelerator
        self.optimizer = make_optimizer(policy.parameters(), train)
        warming = train.lr_scheduler == "constant" and train.lr_warmup_steps  # diffusers' constant knows no warm-up
        self.scheduler = get_scheduler(
            "constant_with_warmup" if warming else train.lr_scheduler,
            self.optimizer,
            num_warmup_steps=train.lr_warmup_steps,
            num_training_steps=total,
        )
        fp16 = train.mixed_precision == "fp16" and policy.model.device.type == "cuda"
        self.scaler = torch.amp.GradScaler(enabled=fp16)

    @property
    def learning_rate(self) -> float:
        """Of the next update."""
        return float(self.scheduler.get_last_lr()[0])

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss`, this process's part of the update's, to what is there."""
        self.scaler.scale(loss).backward()

    def step(self) -> Tensor:
        """One update with the summed gradient of all processes, clipped; returns its norm before clipping.

        A gradient that is not finite counts as 0, which the host need not wait to see.
        """
        parameters = [p for p in self.policy.parameters() if p.grad is not None]
        sum_gradients([p for p in parameters if not isinstance(p, DTensor)], self.accelerator)  # FSDP summed the others
        self.scaler.unscale_(self.optimizer)  # after the sum, in which one process's overflow reaches all
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm.detach()
        for parameter in parameters:  # one gradient that overflowed would end in weights that are not numbers
            grad = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
            grad.masked_fill_(~norm.isfinite(), 0.0)
        self.scaler.step(self.optimizer)
        self.policy.updated()
        self.scaler.update()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def state_dict(self, keep: bool) -> dict[str, Any]:
        """All processes must call it; with sharded weights only who `keep`s gets them."""
        return {
            "optimizer": joined(self.optimizer.state_dict(), keep),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there, at the same place of the schedule, with the options that are asked for now."""
        for parameter, moments in zip(self.policy.parameters(), state["optimizer"]["state"].values(), strict=False):
            moments.update({name: like(value, parameter) for name, value in moments.items()})
        options = [{name: group[name] for name in OPTIONS} for group in self.optimizer.param_groups]
        for name in ("optimizer", "scheduler", "scaler"):
            getattr(self, name).load_state_dict(state[name])
        self.scheduler.base_lrs = [group["initial_lr"] for group in options]
        for group, own, factor in zip(self.optimizer.param_groups, options, self.scheduler.lr_lambdas, strict=True):
            group.update(own, lr=own["initial_lr"] * factor(self.scheduler.last_epoch))
