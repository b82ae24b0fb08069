"""RAFT: reward-ranked fine-tuning (arXiv 2304.06767), flow matching on the best samples of each prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..objective import Objective, detached, squared
from ..types import Batch


@dataclass
class Raft(Objective):
    """Supervised flow matching, loss_i = |v - u|^2, on the `keep` best of a prompt's samples; nothing holds it back."""

    name: Literal["raft"] = "raft"  # of the objective
    keep: int = 1  # samples of each prompt that are trained on, the best ones
    advantage: Literal["batch", "group", "group_std"] = "group"  # any kind ranks a prompt's samples alike
    needs = ()

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(f"objective.keep is {self.keep}; at least the best sample of a prompt must be kept")

    def units(self, advantage: Tensor, group: int) -> Tensor:
        best = advantage.view(-1, group).argsort(dim=1, descending=True)[:, : self.keep]
        return (best + torch.arange(0, len(advantage), group)[:, None]).reshape(-1, 1)

    def units_per_group(self, group: int) -> int:
        return min(self.keep, group)

    def loss(self, velocity: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        fm = squared(velocity.float(), batch.target.float()).mean()
        return fm, detached(loss=fm, fm=fm)
