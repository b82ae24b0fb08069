"""What every scorer does around its model: 8-bit images, batches, no gradient, and no number that is not finite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ..prompts import Prompt
from .clip import RewardError, quantise

if TYPE_CHECKING:
    from torch import Tensor


def score_in_batches(
    score: Callable[[Tensor, Sequence[Prompt]], Tensor],
    images: Tensor,
    prompts: Sequence[Prompt],
    encoder: str,
    batch_size: int,
) -> Tensor:
    """Rewards (B,), float32 on the CPU, of images (B, 3, H, W) in [0, 1] or uint8.

    `score` maps uint8 images and their prompts to rewards of the same number. Images are rounded to 8 bits first, as a
    file holds them. RewardError where a reward or an image is not finite, with the prompts.
    """
    import torch

    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images came with {len(prompts)} prompts; each image needs its own")
    rows = [slice(start, start + batch_size) for start in range(0, len(images), batch_size)]
    with torch.no_grad():
        parts = [score(quantise(images[row]), prompts[row]).float().cpu() for row in rows]
    rewards = torch.cat([torch.zeros(0), *parts])
    if images.is_floating_point():  # rounding to 8 bits has turned a NaN into some number
        rewards[~images.flatten(1).isfinite().all(1).cpu()] = float("nan")
    refuse_broken(rewards, prompts, encoder)
    return rewards


def refuse_broken(rewards: Tensor, prompts: Sequence[Prompt], encoder: str) -> None:
    """RewardError names the prompts whose reward (B,) is not finite."""
    bad = (~rewards.isfinite()).nonzero().flatten().tolist()
    if bad:
        names = list(dict.fromkeys(repr(prompts[row].text) for row in bad))
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise RewardError(
            f"the reward is {rewards[bad[0]].item()} for {len(bad)} of {len(rewards)} images, with the prompts "
            f"{', '.join(names[:3])}{more}: it must be finite. If the images are broken, lower train.learning_rate or "
            f"take mixed_precision bf16 or no; else check the weights of {encoder}"
        )
