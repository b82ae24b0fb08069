"""Diffusion-DPO (arXiv 2311.12908) for flow matching: pairs of the policy's own samples of a prompt, or of a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..objective import Objective, common_metrics, detached, squared
from ..types import Batch


@dataclass
class Dpo(Objective):
    """Preference of a winner w over a loser l of one prompt, at the same noise and sigma:

        loss = -log sigmoid(-(beta / 2) [(fm_w - fmref_w) - (fm_l - fmref_l)])      fm = |v - u|^2, mean over C, h, w

    Pairs are the best with the worst of a prompt's samples, then the second best with the second worst, and so on; a
    pair of equal rewards weighs nothing.
    Errors are means over the latent, as in the paper's code, where beta is 2000 to 5000 for 850,000 human pairs and
    thousands of updates. A LoRA's few updates on its own samples need a weaker pull: the built-in world's best is 10
    (docs/results/main). `pairs_file` takes pairs of images from a file (pairs.py) instead:
    the paper's own, offline DPO.
    """

    name: Literal["dpo"] = "dpo"  # of the objective
    beta: float = 100.0  # how sure a given difference of errors makes
    pairs: int = 1  # of each prompt's samples
    advantage: Literal["batch", "group", "group_std"] = "group"  # any kind ranks a prompt's samples alike
    pairs_file: str | None = None  # JSON lines with prompt, chosen, rejected; nothing is sampled, no reward is asked
    members = 2

    def __post_init__(self) -> None:
        if not self.beta > 0 or self.pairs < 1:
            raise ValueError(f"objective.beta is {self.beta}, it must be positive; pairs is {self.pairs}, at least 1")

    def units(self, advantage: Tensor, group: int) -> Tensor:
        order = advantage.view(-1, group).argsort(dim=1, descending=True)
        pairs = self.units_per_group(group)
        pair = torch.stack([order[:, :pairs], order.flip(1)[:, :pairs]], dim=-1)
        return (pair + torch.arange(0, len(advantage), group)[:, None, None]).reshape(-1, 2)

    def units_per_group(self, group: int) -> int:
        return min(self.pairs, group // 2)

    def loss(self, velocity: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        velocity, target = velocity.float(), batch.target.float()
        fm = squared(velocity, target)
        better, worse = (fm - squared(batch.reference.float(), target)).unflatten(0, (-1, 2)).unbind(1)
        margin = -self.beta / 2 * (better - worse)
        winner, loser = batch.advantage.unflatten(0, (-1, 2)).unbind(1)
        loss = -(F.logsigmoid(margin) * (winner > loser)).mean()
        return loss, detached(
            loss=loss, fm=fm.mean(), preference_rate=(margin > 0).float().mean(), **common_metrics(velocity, batch)
        )
