"""What a run optimises and what it only watches, behind one call: scores by name, and their weighted sum."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .config import Config
from .metrics import mean_and_stderr, paired_difference
from .prompts import Prompt
from .rewards._guarded import guarded
from .rewards._mixed import named_parts

Scores = dict[str, Tensor]  # "reward/NAME" or "watch/NAME" to (B,) float32 on the CPU, in the reward's own unit


class Scoring:
    """Named scorers. What is watched never enters the reward."""

    def __init__(
        self,
        rewards: dict[str, Any],
        weights: dict[str, float] | None = None,
        watch: dict[str, Any] | None = None,
        *,
        normalise: str = "none",
        timeout: float = 600,
        retries: int = 2,
    ) -> None:
        self.scorers = {f"reward/{name}": scorer for name, scorer in rewards.items()}
        self.weights = {f"reward/{name}": (weights or {}).get(name, 1.0) for name in rewards}
        self.scorers |= {f"watch/{name}": scorer for name, scorer in (watch or {}).items()}
        self.normalise, self.timeout, self.retries = normalise, timeout, retries

    @classmethod
    def load(cls, config: Config, device: str | torch.device) -> Scoring:
        """The reward and what is watched of a run. UserError says what is missing."""
        parts, watch = (
            {name: part.load(device) for name, part in named_parts(reward).items()}
            for reward in (config.reward, config.watch)
        )
        return cls(
            parts,
            getattr(config.reward, "weights", None),
            watch,
            normalise=getattr(config.reward, "normalise", "none"),
            timeout=config.reward_timeout,
            retries=config.reward_retries,
        )

    @property
    def unit(self) -> str:
        own = {key: scorer for key, scorer in self.scorers.items() if key in self.weights}
        if len(own) == 1 and set(self.weights.values()) == {1.0} and self.normalise == "none":
            return next(iter(own.values())).unit
        unit = "({})" if self.normalise == "none" else "(standard deviations of {})"
        return " + ".join(
            f"{self.weights[key]:g} {key.partition('/')[2]} {unit.format(scorer.unit)}" for key, scorer in own.items()
        )

    @property
    def encoder(self) -> str:
        return " + ".join(self.scorers[key].encoder for key in self.weights)

    @property
    def units(self) -> dict[str, str]:
        """`unit, encoder` of every score by name."""
        return {key: f"{scorer.unit}, {scorer.encoder}" for key, scorer in self.scorers.items()}

    @property
    def parse_failures(self) -> dict[str, int]:
        """Images so far whose score could not be read from an answer, of the scorers that count such (vlm)."""
        counting = {key: scorer for key, scorer in self.scorers.items() if hasattr(scorer, "parse_failures")}
        return {f"{key}.parse_failures": scorer.parse_failures for key, scorer in counting.items()}

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Scores of images (B, 3, H, W) in [0, 1] and their prompts. RewardError names the reward that has none."""
        return {key: self._score(key, lambda s=s: s(images, prompts), prompts) for key, s in self.scorers.items()}

    @property
    def embedder(self) -> Any:
        """The first scorer that embeds images, or None."""
        return next((scorer for scorer in self.scorers.values() if hasattr(scorer, "embed_images")), None)

    def with_embeddings(
        self, images: Tensor, prompts: Sequence[Prompt], embedder: Any = None
    ) -> tuple[Scores, Tensor | None]:
        """Scores, and image embeddings (B, E) of `embedder`; without one, of the first scorer that has some."""
        if embedder is not None or self.embedder is None:
            return self(images, prompts), None if embedder is None else embedder.embed_images(images)
        embeddings, scores = self.embedder.embed_images(images), {}  # once, for score and diversity
        for key, scorer in self.scorers.items():
            call = partial(scorer.score, embeddings) if scorer is self.embedder else partial(scorer, images)
            scores[key] = self._score(key, partial(call, prompts), prompts)
        return scores, embeddings

    def _score(self, key: str, call: Any, prompts: Sequence[Prompt]) -> Tensor:
        return guarded(call, key.partition("/")[2], prompts, self.timeout, self.retries)

    def total(self, scores: Scores, reference: Scores | None = None) -> Tensor:
        """The reward (B,) = sum of weight x score, normalised or raw.

        Normalised it is weight x (score - mean) / standard deviation, over `reference` where given (a measurement is
        compared with an earlier one in its units), else over the scores themselves; a constant score counts 0.
        """
        total = torch.zeros(len(next(iter(scores.values()))))
        for key, weight in self.weights.items():
            values = scores[key]
            if self.normalise == "batch":
                base = values if reference is None else reference[key]
                spread = base.std(correction=0).item()
                values = (values - base.mean()) / spread if spread > 1e-8 else torch.zeros_like(values)
            total += weight * values
        return total

    def means(self, scores: Scores) -> dict[str, float]:
        return {key: values.mean().item() for key, values in scores.items()}

    def compared(self, before: Scores, after: Scores | None, prompt: Tensor) -> dict[str, dict[str, Any]]:
        """{"rewards": {NAME: {"before", "after", "difference", "unit"}}, "watch": ...}; scores (B,) paired by noise.

        Each is a mean with its standard error, clustered by `prompt` (B,); None without `after`.
        """
        result: dict[str, dict[str, Any]] = {"rewards": {}, "watch": {}}
        for key, unit in self.units.items():
            kind, _, name = key.partition("/")
            result["watch" if kind == "watch" else "rewards"][name] = {
                "unit": unit,
                "before": mean_and_stderr(before[key], prompt),
                "after": mean_and_stderr(after[key], prompt) if after else None,
                "difference": paired_difference(before[key], after[key], prompt) if after else None,
            }
        return result
