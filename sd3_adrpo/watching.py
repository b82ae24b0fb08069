"""What a run looks at besides the reward after every epoch: cheap figures of the epoch's own images."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from .metrics import clip_diversity, mean_and_stderr

CURVE_IMAGES = 256


def sampled_accuracy(images: Tensor | None, texts: list[str], accelerator: Accelerator) -> dict[str, float]:
    """Of all processes' images, uint8 (B, 3, H, W), where the prompts are of the built-in world."""
    from .shapes.verifier import verify  # late: other models do not need the built-in world

    if images is None or images.shape[-1] != 64:
        return {}
    answers = [answer for answer in verify(images.float() / 255, texts) if answer is not None]
    counts = torch.tensor([sum(answers), len(answers)], dtype=torch.float32, device=accelerator.device)
    right, number = accelerator.reduce(counts, "sum").tolist()
    return {"accuracy": right / number} if number else {}


def sampled_diversity(images: Tensor | None, texts: list[str], embedder: Any) -> dict[str, float]:
    """Of the epoch's first images, where something embeds them: enough for a curve."""
    if embedder is None or images is None:
        return {}
    texts = texts[:CURVE_IMAGES]
    index = torch.tensor([texts.index(text) for text in texts])
    value = mean_and_stderr(clip_diversity(embedder.embed_images(images[: len(texts)]), index))["mean"]
    return {} if value is None else {"clip_diversity": value}
