"""Small random checkpoints under the published names, shared by the tests of the rewards that load such models."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from sd3_adrpo.prompts import Prompt
from sd3_adrpo.rewards.clip import quantise

PROMPTS = [Prompt("a red cube"), Prompt("two blue balls left of a café"), Prompt("a red cube")]
STEP = 1.001 / 255  # one step of 8 bits
# the numbers of the layers of the published heads: dropouts stand between
LAION_LAYERS, V25_LAYERS = (0, 2, 4, 6, 7), (0, 2, 4, 6, 8)


def images(height: int, width: int | None = None, count: int = 3) -> Tensor:
    """Smooth areas and hard edges, in [0, 1]."""
    width = width or height
    result = torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(height + width))
    result[:, :, height // 4 : height // 2] = 1.0
    result[:, :, :, : width // 3] = 0.0
    return result


def pil(batch: Tensor) -> list:
    return [to_pil_image(image) for image in quantise(batch)]


def head(prefix: str, numbers: tuple[int, ...], width: int) -> dict[str, Tensor]:
    """WIDTH -> 8 -> 7 -> 6 -> 5 -> 1 under the names PREFIX.NUMBER.weight and .bias."""
    generator, sizes = torch.Generator().manual_seed(1), [width, 8, 7, 6, 5, 1]
    state = {}
    for number, (before, after) in zip(numbers, zip(sizes, sizes[1:], strict=False), strict=True):
        state[f"{prefix}.{number}.weight"] = torch.randn(after, before, generator=generator)
        state[f"{prefix}.{number}.bias"] = torch.randn(after, generator=generator)
    return state


def apply_head(state: dict[str, Tensor], prefix: str, numbers: tuple[int, ...], x: Tensor) -> Tensor:
    for number in numbers:
        x = x @ state[f"{prefix}.{number}.weight"].T + state[f"{prefix}.{number}.bias"]
    return x[:, 0]
