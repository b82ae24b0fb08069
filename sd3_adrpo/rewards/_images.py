"""Images as a user would save them: 8 bits, PIL, PNG."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


def quantise(images: Tensor) -> Tensor:
    """uint8, as an image file holds it; uint8 stays as it is."""
    import torch

    return images if images.dtype == torch.uint8 else (images * 255).round().clamp(0, 255).to(torch.uint8)


def to_pil(images: Tensor) -> list[Image]:
    """Images (B, 3, H, W) in [0, 1], or uint8, as B images of 8 bits."""
    from PIL import Image

    return [Image.fromarray(image.numpy()) for image in quantise(images).permute(0, 2, 3, 1).contiguous().cpu()]


def file_bytes(image: Image, format: str, **options: object) -> bytes:
    """The image as a file of PIL's `format`."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()
