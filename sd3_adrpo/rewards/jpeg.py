"""JPEG size as a reward: cheap, without any model, and hard to argue with. DDPO's compressibility, arXiv 2305.13301."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..errors import UserError
from ..prompts import Prompt
from ._images import file_bytes, to_pil

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass
class JpegReward:
    """Minus the image's size as a JPEG file in kB (1000 bytes), or minus the distance to a size."""

    name: Literal["jpeg"] = "jpeg"
    target: float | None = None  # kB to come close to; None: the smaller the better
    quality: int = 95  # of the JPEG file, as DDPO has it

    def describe(self) -> str:
        """UserError for a quality or a target that no file has."""
        if not 1 <= self.quality <= 100:
            raise UserError(f"the jpeg reward's quality is {self.quality}; it must be from 1 to 100")
        if self.target is not None and not self.target > 0:
            raise UserError(f"the jpeg reward's target is {self.target} kB; it must be positive, or None")
        return f"{self.unit}, JPEG of quality {self.quality}"

    @property
    def unit(self) -> str:
        return "-kB" if self.target is None else f"-|kB - {self.target:g}|"

    def load(self, device: str | torch.device = "cpu") -> JpegScorer:
        self.describe()
        return JpegScorer(self)


class JpegScorer:
    def __init__(self, config: JpegReward) -> None:
        self.config, self.unit, self.encoder = config, config.unit, f"JPEG of quality {config.quality}"

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Rewards (B,) of images (B, 3, H, W) in [0, 1], or uint8; the prompts do not matter."""
        import torch

        sizes = [len(file_bytes(image, "JPEG", quality=self.config.quality)) / 1000 for image in to_pil(images)]
        return -(torch.tensor(sizes) - (self.config.target or 0.0)).abs()
