"""Images to a model's input as PIL does it, on tensors and on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .clip import _resize

if TYPE_CHECKING:
    import torch
    from torch import Tensor

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images, also BLIP's
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Preprocessing:
    """Resize, centre crop, scale to [0, 1], normalise. Within 1/255 of PIL's own values before normalisation."""

    resize: int | tuple[int, int]  # the shorter side, or height and width
    crop: int | None = None
    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD
    interpolation: str = "bicubic"
    rounds_down: bool = False  # where an odd margin goes: transformers' crop takes the lower half, torchvision rounds

    @classmethod
    def of(cls, processor: Any) -> Preprocessing:
        """The steps of an image processor of transformers that resizes, crops and normalises."""
        from PIL.Image import Resampling

        size, crop = processor.size, processor.crop_size if getattr(processor, "do_center_crop", False) else None
        resize = size["shortest_edge"] if "shortest_edge" in size else (size["height"], size["width"])
        name = Resampling(processor.resample).name.lower()
        crop = crop and crop["height"]
        return cls(resize, crop, tuple(processor.image_mean), tuple(processor.image_std), name, rounds_down=True)

    def __call__(self, images: Tensor, device: str | torch.device) -> Tensor:
        """uint8 images (B, 3, H, W) to the model's input (B, 3, h, w) on `device`."""
        from torchvision.transforms import InterpolationMode, Resize
        from torchvision.transforms.functional import normalize

        images = _resize(images.to(device), Resize(self.resize, InterpolationMode(self.interpolation)))
        if self.crop:
            top, left = (self._margin(side) for side in images.shape[-2:])
            images = images[..., top : top + self.crop, left : left + self.crop]
        return normalize(images.float() / 255, self.mean, self.std)

    def _margin(self, side: int) -> int:
        return (side - self.crop) // 2 if self.rounds_down else round((side - self.crop) / 2)
