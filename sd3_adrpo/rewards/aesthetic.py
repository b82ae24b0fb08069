"""LAION's aesthetic predictor V2: CLIP ViT-L/14 and a linear head, of github.com/christophschuhmann's
improved-aesthetic-predictor. The prompt plays no part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..errors import UserError
from ..prompts import Prompt
from ._weights import check_source, find_file, linear_head, loading, read_state

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ._preprocess import Preprocessing

HEAD_FILE = "sac+logos+ava1-l14-linearMSE.pth"
HEAD = (
    "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth"
)
UNIT = "aesthetic rating, 1 to 10"


@dataclass
class AestheticReward:
    """LAION aesthetic V2: the mean rating that people would give, on their scale from 1 to 10; most are 4 to 7."""

    name: Literal["aesthetic"] = "aesthetic"
    model: str = "openai/clip-vit-large-patch14"  # a folder or hub id, of OpenAI's CLIP ViT-L/14
    head: str = HEAD  # a file, a folder that holds it, or its URL
    batch_size: int = 32  # images per forward pass

    def describe(self) -> str:
        check_source(self.model, "model")
        check_source(self.head, "head")
        return f"{UNIT}, {self.model}"

    def load(self, device: str | torch.device = "cpu") -> AestheticScorer:
        """float32 and in evaluation mode, on `device`. UserError where the weights cannot be had."""
        from transformers import CLIPVisionModelWithProjection

        from ._preprocess import Preprocessing

        head = load_head(self, HEAD_FILE, "layers")
        with loading("model", self.model):
            model = CLIPVisionModelWithProjection.from_pretrained(self.model, dtype="float32")
        size = model.config.image_size
        steps = Preprocessing(size, crop=size)  # OpenAI's own transform
        embed = lambda pixels: model(pixel_values=pixels).image_embeds  # noqa: E731
        return join(self, model, embed, model.config.projection_dim, head, steps, device)


def load_head(reward: Any, name: str, prefix: str) -> Any:
    """The linear layers `prefix` of the file `name` that `reward.head` means. It is small: what fails, fails early."""
    file = find_file(reward.head, name, "head")
    return linear_head(read_state(file), prefix, file)


def join(
    reward: Any, model: Any, embed: Any, width: int, head: Any, preprocess: Preprocessing, device: str | torch.device
) -> AestheticScorer:
    """An encoder, whose `embed` gives `width` numbers, and its head. UserError where they do not belong together."""
    if head[0].in_features != width:
        raise UserError(
            f"reward.head {reward.head} takes embeddings of {head[0].in_features} numbers, reward.model "
            f"{reward.model} gives {width}: take the head and the encoder that were published together (the defaults)"
        )
    return AestheticScorer(
        embed, [model.to(device), head.to(device)], preprocess, reward.model, device, reward.batch_size
    )


class AestheticScorer:
    """The head on the image's embedding of length 1."""

    unit = UNIT

    def __init__(
        self,
        embed: Any,
        modules: list[Any],
        preprocess: Preprocessing,
        encoder: str,
        device: str | torch.device = "cpu",
        batch_size: int = 32,
    ) -> None:
        self.embed, self.modules = embed, [module.eval().requires_grad_(False) for module in modules]
        self.preprocess, self.encoder, self.device, self.batch_size = preprocess, encoder, device, batch_size

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Rewards (B,) of images (B, 3, H, W); the prompts are counted, not read. RewardError where not finite."""
        from ._scoring import score_in_batches

        return score_in_batches(self._score, images, prompts, self.encoder, self.batch_size)

    def _score(self, images: Tensor, _: Sequence[Prompt]) -> Tensor:
        from torch.nn.functional import normalize

        embedding = self.embed(self.preprocess(images, self.device))
        return self.modules[-1](normalize(embedding, dim=-1)).squeeze(-1)
