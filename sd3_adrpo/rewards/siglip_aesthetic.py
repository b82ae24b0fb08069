"""Aesthetic predictor V2.5: SigLIP so400m and a linear head, of github.com/discus0434/aesthetic-predictor-v2-5.

The prompt plays no part. The head's weights are under the AGPL-3.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ._weights import check_source, loading
from .aesthetic import join, load_head

if TYPE_CHECKING:
    import torch

    from .aesthetic import AestheticScorer

HEAD_FILE = "aesthetic_predictor_v2_5.pth"
HEAD = "https://github.com/discus0434/aesthetic-predictor-v2-5/raw/main/models/aesthetic_predictor_v2_5.pth"
UNIT = "aesthetic rating, 1 to 10"


@dataclass
class SiglipAestheticReward:
    """Aesthetic V2.5: a rating from 1 to 10, also for drawings; its author calls 5.5 and more a great score."""

    name: Literal["siglip_aesthetic"] = "siglip_aesthetic"
    model: str = "google/siglip-so400m-patch14-384"  # a folder or hub id
    head: str = HEAD  # a file, a folder that holds it, or its URL
    batch_size: int = 32  # images per forward pass

    def describe(self) -> str:
        check_source(self.model, "model")
        check_source(self.head, "head")
        return f"{UNIT}, {self.model}"

    def load(self, device: str | torch.device = "cpu") -> AestheticScorer:
        """float32 and in evaluation mode, on `device`; the author's example runs in bfloat16. UserError where the
        weights cannot be had."""
        from transformers import AutoImageProcessor, SiglipVisionModel

        from ._preprocess import Preprocessing

        head = load_head(self, HEAD_FILE, "scoring_head")
        with loading("model", self.model):
            model = SiglipVisionModel.from_pretrained(self.model, dtype="float32")
            steps = Preprocessing.of(AutoImageProcessor.from_pretrained(self.model))
        embed = lambda pixels: model(pixel_values=pixels).pooler_output  # noqa: E731
        return join(self, model, embed, model.config.hidden_size, head, steps, device)
