"""DINOv2 embeddings (Oquab et al., arXiv 2304.07193) by transformers, for `dino_diversity`."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.functional import center_crop, normalize, resize

from ..errors import UserError
from ..rewards.clip import quantise

MODEL = "facebook/dinov2-base"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


@cache
def load_dino(model: str = MODEL, device: str = "cpu") -> Dino:
    """A hub id or a local folder. UserError where it does not load."""
    from transformers import AutoModel

    try:
        return Dino(AutoModel.from_pretrained(model).eval().requires_grad_(False).to(device), device)
    except (OSError, ValueError) as error:
        raise UserError(f"dino_diversity: {model} does not load: {error}; give a hub id or a local folder") from error


class Dino:
    """The published preprocessing: shorter side to 256 (bicubic), the middle 224 pixels, ImageNet's mean and spread."""

    def __init__(self, model: Any, device: str) -> None:
        self.model, self.device = model, device

    def preprocess(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], or uint8, to (B, 3, 224, 224)."""
        resized = resize(quantise(images).to(self.device), 256, antialias=True, interpolation=3)  # 3: bicubic
        return normalize(center_crop(resized, 224).float() / 255, MEAN, STD)

    @torch.no_grad()
    def embed_images(self, images: Tensor, batch_size: int = 32) -> Tensor:
        """The class token after the last norm, (B, E)."""
        parts = [self.model(self.preprocess(part)).last_hidden_state[:, 0] for part in images.split(batch_size)]
        return torch.cat(parts).float()
