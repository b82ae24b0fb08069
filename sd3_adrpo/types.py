"""The values that flow through the program, and the one convention they obey.

    sigma in [0, 1], 1 = pure noise        noisy    = (1 - sigma) * clean + sigma * noise
    velocity = noise - clean               transformer(noisy, timestep = 1000 * sigma) ~ velocity
    sampling integrates d noisy / d sigma = velocity from sigma = 1 down to 0

This is SD3's and diffusers'. Papers that write t = 1 - sigma have velocities of the other sign; the objectives here
depend on differences of velocities only and do not see it.

Shapes: N unique prompts, B samples, T text tokens, D text width, P pooled width, C h w a latent, H W an image.
Units: rewards in the reward's own (CLIP: 100 x cosine), images in [0, 1], drift |v - v_ref|^2 as a mean over C, h, w.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # by train.mixed_precision


@dataclass(frozen=True)
class Condition:
    """Prompt embeddings: one row per unique prompt when cached, one per sample when `select`ed."""

    embeds: Tensor  # (N, T, D); cached on disk, its text_cache.Rows
    pooled: Tensor  # (N, P)
    repeats: int = 1  # how many equal tokens the last of T stands for (models/repeated_token.py)

    def select(self, index: Tensor) -> Condition:
        """The rows `index`; a single row is that of every prompt."""
        index = index if len(self) > 1 else torch.zeros_like(index)
        return Condition(self.embeds[index], self.pooled[index], self.repeats)

    def to(self, *args, **kwargs) -> Condition:
        return Condition(self.embeds.to(*args, **kwargs), self.pooled.to(*args, **kwargs), self.repeats)

    def cat(self, other: Condition) -> Condition:
        pooled = torch.cat([self.pooled, other.pooled])
        return Condition(torch.cat([self.embeds, other.embeds]), pooled, self.repeats)

    def __len__(self) -> int:
        return len(self.embeds)


@dataclass
class Rollout:
    """An epoch's samples, those of all processes."""

    prompt: Tensor  # (B,) index of the prompt, long, on the CPU
    clean: Tensor  # (B, C, h, w) sampled latents
    rewards: Tensor  # (B,) float32, CPU
    images: Tensor | None = None  # (B, 3, H, W) uint8, CPU; of several processes each has its own share
    scores: dict[str, Tensor] = field(default_factory=dict)  # each (B,): what the reward is made of, what is watched
    path: Tensor | None = None  # (B, S + 1, C, h, w) every state of the stochastic sampler, noise first
    velocity: Tensor | None = None  # (B, S, C, h, w) along the path, of the policy that sampled

    @classmethod
    def cat(cls, parts: list[Rollout]) -> Rollout:
        def join(name: str) -> Tensor | None:
            values = [getattr(part, name) for part in parts]
            return None if values[0] is None else torch.cat(values)

        scores = {name: torch.cat([part.scores[name] for part in parts]) for name in parts[0].scores}
        others = {name: join(name) for name in ("prompt", "clean", "rewards", "images", "path", "velocity")}
        return cls(scores=scores, **others)


@dataclass(frozen=True)
class Batch:
    """What an objective's loss sees: noise draws, each with its sample's advantage. B counts draws.

    Samples that are judged together (`Objective.members`) are neighbours at the same noise and sigma.
    """

    advantage: Tensor  # (B,) as the objective weighs it
    sigma: Tensor  # (B,)
    noisy: Tensor  # (B, C, h, w)
    target: Tensor  # (B, C, h, w) u = noise - clean
    reference: Tensor | None  # (B, C, h, w) v_ref at the same noisy and sigma, no gradient
    condition: Condition
    negative: Condition | None = None  # of the prompts' opposites, where training is guided
    old: Tensor | None = None  # (B, C, h, w) velocity of the averaged policy, or of the one that sampled the path
    next_noisy: Tensor | None = None  # (B, C, h, w) where the path went from noisy
    next_sigma: Tensor | None = None  # (B,)
