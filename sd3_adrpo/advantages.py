"""Rewards to advantages. Every function sees the whole global batch, so processes cannot change the result."""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 1e-4  # of the critic's regression, per sample; embeddings have length about 1
FORGET = 0.9  # weight of the past, per epoch: the policy's rewards move
EPSILON = 1e-6  # of the reward's own unit; a constant reward gives A = 0


class Advantages:
    """Normalised rewards by one of the kinds below; `running` keeps statistics per prompt over the epochs.

        batch      (R - mean) / std               over the whole batch (the default)
        group      (R - mean of the prompt) / std of what remains, over the whole batch
        group_std  (R - mean of the prompt) / std of the prompt (GRPO, arXiv 2402.03300)
        running    (R - running mean of the prompt) / running std of all deviations
        critic     (R - V(c)) / std of what remains; V is a ridge regression of all rewards so far on the pooled
                   prompt embedding, so prompts that were never drawn have a value too

    Standard deviations are the population's (divided by n).
    """

    KINDS = ("batch", "group", "group_std", "running", "critic")

    def __init__(self, kind: str = "batch", pooled: Tensor | None = None) -> None:
        """`pooled` (N, P) are the prompts' embeddings, which only `critic` needs."""
        if kind not in self.KINDS:
            raise ValueError(f"advantage is {kind!r}; allowed are {', '.join(self.KINDS)}")
        self.kind = kind
        self._features = _features(pooled) if kind == "critic" else None
        self._products: tuple[Tensor, Tensor] | None = None  # X'X and X'R of all rewards so far, for `critic`
        self._statistics: dict[int, tuple[int, float]] = {}  # prompt -> count and mean of all its rewards so far
        self._squares = (0, 0.0)  # count and sum of squared deviations of all rewards so far

    def __call__(self, rewards: Tensor, prompt: Tensor) -> Tensor:
        """A (B,) for rewards (B,) of the prompts (B,), not clipped."""
        rewards = rewards.double()
        if self.kind == "batch":
            centred = rewards - rewards.mean()
            return (centred / (centred.square().mean().sqrt() + EPSILON)).float()
        if self.kind == "running":
            return self._running(rewards, prompt).float()
        if self.kind == "critic":
            return self._critic(rewards, prompt).float()
        _, group = prompt.unique(return_inverse=True)
        size = torch.bincount(group).double()
        centred = rewards - (torch.zeros_like(size).index_add_(0, group, rewards) / size)[group]
        if self.kind == "group":
            return (centred / (centred.square().mean().sqrt() + EPSILON)).float()
        variance = torch.zeros_like(size).index_add_(0, group, centred.square()) / size
        return (centred / (variance.sqrt()[group] + EPSILON)).float()

    def _running(self, rewards: Tensor, prompt: Tensor) -> Tensor:
        for key in prompt.unique().tolist():
            values = rewards[prompt == key]
            count, mean = self._statistics.get(key, (0, 0.0))
            total = count + len(values)
            self._statistics[key] = (total, mean + (values.sum().item() - mean * len(values)) / total)
        means = torch.tensor([self._statistics[key][1] for key in prompt.tolist()], dtype=torch.double)
        centred = rewards - means
        count, squares = self._squares
        self._squares = (count + len(rewards), squares + centred.square().sum().item())
        return centred / ((self._squares[1] / self._squares[0]) ** 0.5 + EPSILON)

    def _critic(self, rewards: Tensor, prompt: Tensor) -> Tensor:
        x = self._features[prompt]
        products = (x.T @ x, x.T @ rewards)
        if self._products is not None:
            products = tuple(FORGET * old + new for old, new in zip(self._products, products, strict=True))
        self._products = products
        ridge = RIDGE * products[0].diagonal()[-1] * torch.eye(len(products[0]), dtype=torch.double)
        ridge[-1, -1] = 0  # the constant is free
        centred = rewards - x @ torch.linalg.solve(products[0] + ridge, products[1])
        return centred / (centred.square().mean().sqrt() + EPSILON)

    def state_dict(self) -> dict:
        return {
            "kind": self.kind,
            "statistics": [[key, count, mean] for key, (count, mean) in self._statistics.items()],
            "squares": list(self._squares),
            "products": self._products,
        }

    def load_state_dict(self, state: dict) -> None:
        if state["kind"] != self.kind:  # another kind is given now: its statistics begin here
            return
        self._statistics = {key: (count, mean) for key, count, mean in state["statistics"]}
        self._squares = tuple(state["squares"])
        self._products = state["products"]


def _features(pooled: Tensor) -> Tensor:
    """Embeddings (N, P) standardised as one cloud, with a constant: (N, P + 1), double."""
    pooled = pooled.double().cpu()
    centred = pooled - pooled.mean(0)
    scaled = centred / (centred.square().sum(1).mean().sqrt() + EPSILON)
    return torch.cat([scaled, torch.ones(len(pooled), 1, dtype=torch.double)], dim=1)
