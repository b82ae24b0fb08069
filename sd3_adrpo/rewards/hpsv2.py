"""HPSv2.1: human preference score of image and prompt, by a CLIP ViT-H/14 trained on HPDv2 (arXiv 2306.09341)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..prompts import Prompt
from ._weights import check_source, find_file, load_strictly, read_state
from .clip import ClipScorer, quantise

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ARCHITECTURE = "ViT-H-14"  # open_clip's name
FILE = "HPS_v2.1_compressed.pt"
UNIT = "100 x cosine"


@dataclass
class Hpsv2Reward:
    """HPSv2.1: 100 x cosine of image and prompt, about 20 to 32, as in its tables; hpsv2.score() gives a hundredth."""

    name: Literal["hpsv2"] = "hpsv2"
    model: str = "xswu/HPSv2"  # a hub id or folder that holds HPS_v2.1_compressed.pt, or a checkpoint file
    batch_size: int = 32  # images per forward pass

    def describe(self) -> str:
        check_source(self.model, "model")
        return f"{UNIT}, HPSv2.1 of {self.model}"

    def load(self, device: str | torch.device = "cpu") -> Hpsv2Scorer:
        """float32 and in evaluation mode, on `device`. UserError where the weights cannot be had."""
        import open_clip

        file = find_file(self.model, FILE, "model")
        model = open_clip.create_model(ARCHITECTURE, pretrained=None, load_weights=False)
        load_strictly(model, read_state(file), file)
        scorer = Hpsv2Scorer(model.to(device), None, open_clip.get_tokenizer(ARCHITECTURE), file.name, device)
        scorer.batch_size = self.batch_size
        return scorer


class Hpsv2Scorer(ClipScorer):
    """Differs from CLIP in its weights and its preprocessing, which keeps the whole of an image that is not square.

    Both embeddings are of length 1, and the score is not multiplied by the logit scale.
    """

    unit = UNIT
    batch_size = 32

    def preprocess(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], or uint8, to the model's input (B, 3, h, w).

        As HPSv2's evaluation transform: scaled to [0, 1] first, then resized so that the longer side fits, bicubic and
        not clipped, then padded with black, then normalised. Resizing smooths (antialias), torchvision's default since
        0.17; before, and so perhaps for the published tables, it did not.
        """
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.functional import normalize, pad, resize

        from ._preprocess import OPENAI_MEAN, OPENAI_STD

        images = quantise(images).to(self.device).float() / 255
        sides = images.shape[-2:]
        side = self.model.visual.image_size[0]
        if max(sides) != side:
            height, width = (round(length * side / max(sides)) for length in sides)
            images = resize(images, [height, width], InterpolationMode.BICUBIC, antialias=True)
            left, top = (side - width) // 2, (side - height) // 2
            images = pad(images, [left, top, side - width - left, side - height - top])
        return normalize(images, OPENAI_MEAN, OPENAI_STD)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Rewards (B,) of images (B, 3, H, W). RewardError where one is not finite."""
        from ._scoring import score_in_batches

        return score_in_batches(self._score, images, prompts, self.encoder, self.batch_size)

    def _score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        texts = self.embed_texts([prompt.text for prompt in prompts])
        return 100 * (self.embed_images(images) * texts).sum(-1)
