"""PickScore: what people on Pick-a-Pic preferred, by a CLIP ViT-H/14 trained on their choices (arXiv 2305.01569)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..prompts import Prompt
from ._weights import check_source, loading

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ._preprocess import Preprocessing

PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # of the CLIP that PickScore started from
UNIT = "logit scale x cosine, about 20"


@dataclass
class PickscoreReward:
    """PickScore: logit scale (100) x cosine of image and prompt, about 18 to 24; not divided by 26 as some do."""

    name: Literal["pickscore"] = "pickscore"
    model: str = "yuvalkirstain/PickScore_v1"  # a folder or hub id, of a CLIP in transformers' format
    processor: str | None = None  # tokenizer and preprocessing; None: those in the model's folder, else the published
    batch_size: int = 32  # images per forward pass

    def describe(self) -> str:
        """UserError where a folder that is named is not there; so with all these rewards."""
        check_source(self.model, "model")
        if self.processor is not None:
            check_source(self.processor, "processor")
        return f"{UNIT}, {self.model}"

    def load(self, device: str | torch.device = "cpu") -> PickscoreScorer:
        """float32 and in evaluation mode, on `device`. UserError where the weights cannot be had."""
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        from ._preprocess import Preprocessing

        with loading("model", self.model):
            model = CLIPModel.from_pretrained(self.model, dtype="float32")
        own = (Path(self.model).expanduser() / "preprocessor_config.json").is_file()
        processor = self.processor or (self.model if own else PROCESSOR)
        with loading("processor", processor):
            steps = Preprocessing.of(AutoImageProcessor.from_pretrained(processor))
            tokenizer = AutoTokenizer.from_pretrained(processor)
        return PickscoreScorer(model.to(device), steps, tokenizer, self.model, device, self.batch_size)


class PickscoreScorer:
    """exp(logit_scale) x cosine, as in the authors' example; both embeddings are of length 1."""

    unit = UNIT

    def __init__(
        self,
        model: Any,
        preprocess: Preprocessing,
        tokenizer: Any,
        encoder: str,
        device: str | torch.device = "cpu",
        batch_size: int = 32,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.preprocess, self.tokenizer, self.encoder = preprocess, tokenizer, encoder
        self.device, self.batch_size = device, batch_size

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Rewards (B,) of images (B, 3, H, W). RewardError where one is not finite."""
        from ._scoring import score_in_batches

        return score_in_batches(self._score, images, prompts, self.encoder, self.batch_size)

    def _score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        from torch.nn.functional import normalize

        texts = list(dict.fromkeys(prompt.text for prompt in prompts))  # a rollout has many images of a prompt
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=self._length, return_tensors="pt")
        text = self.model.get_text_features(**tokens.to(self.device)).pooler_output
        image = self.model.get_image_features(pixel_values=self.preprocess(images, self.device)).pooler_output
        cosine = normalize(image, dim=-1) @ normalize(text, dim=-1).T
        column = [texts.index(prompt.text) for prompt in prompts]
        return self.model.logit_scale.exp() * cosine[range(len(prompts)), column]

    @property
    def _length(self) -> int:
        return self.model.config.text_config.max_position_embeddings  # 77
