"""Rewards to advantages. Every function sees the whole global batch, so processes cannot change the result."""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-6  # of the reward's own unit; a constant reward gives A = 0


class Advantages:
    """Normalised rewards by one of the kinds below; `running` keeps statistics per prompt over the epochs.

        batch      (R - mean) / std               over the whole batch (the default)
        group      (R - mean of the prompt) / std of what remains, over the whole batch
        group_std  (R - mean of the prompt) / std of the prompt (GRPO, arXiv 2402.03300)
        running    (R - running mean of the prompt) / running std of all deviations

    Standard deviations are the population's (divided by n).
    """

    KINDS = ("batch", "group", "group_std", "running")

    def __init__(self, kind: str = "batch") -> None:
        if kind not in self.KINDS:
            raise ValueError(f"advantage is {kind!r}; allowed are {', '.join(self.KINDS)}")
        self.kind = kind
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

    def state_dict(self) -> dict:
        return {
            "kind": self.kind,
            "statistics": [[key, count, mean] for key, (count, mean) in self._statistics.items()],
            "squares": list(self._squares),
        }

    def load_state_dict(self, state: dict) -> None:
        self.kind = state["kind"]
        self._statistics = {key: (count, mean) for key, count, mean in state["statistics"]}
        self._squares = tuple(state["squares"])
