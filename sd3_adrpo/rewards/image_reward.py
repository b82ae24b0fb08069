"""ImageReward: human preference of image and prompt, by BLIP's image-grounded text encoder (arXiv 2304.05977)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..errors import UserError
from ..prompts import Prompt
from ._weights import check_source, find_file, linear_head, load_strictly, loading, read_state

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor, nn

FILE = "ImageReward.pt"
UNIT = "standard deviations of its authors' validation images"
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the head's output there; published with the weights
LENGTH = 35  # tokens of the prompt
HEAD_WIDTH = 64  # of an attention head, in BLIP's vision and text transformers alike

# (published name, transformers' name), replaced in this order
VISION_NAMES = [
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj", "embeddings.patch_embedding"),
    ("blocks.", "encoder.layers."),
    (".attn.proj.", ".self_attn.projection."),
    (".attn.", ".self_attn."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
]


@dataclass
class ImageRewardReward:
    """ImageReward: normalised to mean 0 and standard deviation 1, about -2 to 2."""

    name: Literal["image_reward"] = "image_reward"
    model: str = "THUDM/ImageReward"  # a hub id or folder that holds ImageReward.pt, or that file
    tokenizer: str = "google-bert/bert-base-uncased"  # a folder or hub id
    batch_size: int = 32  # images per forward pass

    def describe(self) -> str:
        check_source(self.model, "model")
        check_source(self.tokenizer, "tokenizer")
        return f"{UNIT}, ImageReward of {self.model}"

    def load(self, device: str | torch.device = "cpu") -> ImageRewardScorer:
        """float32 and in evaluation mode, on `device`. UserError where the weights cannot be had."""
        from transformers import AutoTokenizer

        file = find_file(self.model, FILE, "model")
        with loading("tokenizer", self.tokenizer):
            tokenizer = AutoTokenizer.from_pretrained(self.tokenizer)
        vision, text, head = build(read_state(file), file)
        return ImageRewardScorer(vision, text, head, tokenizer, file.name, device, self.batch_size)


def build(state: dict[str, Tensor], file: str | Path) -> tuple[nn.Module, nn.Module, nn.Module]:
    """BLIP's vision model, its text encoder with cross attention, and the head; sizes are read from the weights."""
    from transformers import BlipTextConfig, BlipVisionConfig
    from transformers.models.blip.modeling_blip import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    image, words = _part(state, "blip.visual_encoder.", file), _part(state, "blip.text_encoder.", file)
    words.pop("embeddings.position_ids", None)  # a counter, which some versions of BLIP save
    for old, new in VISION_NAMES:
        image = {name.replace(old, new): value for name, value in image.items()}
    image = {name.replace("norm.", "post_layernorm.") if name[:5] == "norm." else name: v for name, v in image.items()}
    patches = image["embeddings.patch_embedding.weight"]  # (width, 3, side, side)
    width, side = patches.shape[0], patches.shape[-1]
    vision = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=width,
            intermediate_size=image["encoder.layers.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=_depth(image, "encoder.layers."),
            num_attention_heads=width // HEAD_WIDTH,
            image_size=side * round((image["embeddings.position_embedding"].shape[1] - 1) ** 0.5),
            patch_size=side,
            layer_norm_eps=1e-6,
        )
    )
    vocabulary, hidden = words["embeddings.word_embeddings.weight"].shape
    text = BlipTextModel(
        BlipTextConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            encoder_hidden_size=width,
            intermediate_size=words["encoder.layer.0.intermediate.dense.weight"].shape[0],
            num_hidden_layers=_depth(words, "encoder.layer."),
            num_attention_heads=hidden // HEAD_WIDTH,
            max_position_embeddings=words["embeddings.position_embeddings.weight"].shape[0],
            layer_norm_eps=1e-12,
            is_decoder=True,  # makes the cross attention; the mask stays bidirectional
        ),
        add_pooling_layer=False,
    )
    load_strictly(vision, image, file)
    load_strictly(text, words, file)
    return vision, text, linear_head(state, "mlp.layers", file)


def _part(state: dict[str, Tensor], prefix: str, file: str | Path) -> dict[str, Tensor]:
    found = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
    if not found:
        raise UserError(f"{file} has no {prefix}*: it is not {FILE} of THUDM/ImageReward; it has {list(state)[:3]}")
    return found


def _depth(state: dict[str, Tensor], prefix: str) -> int:
    return 1 + max(int(name[len(prefix) :].partition(".")[0]) for name in state if name.startswith(prefix))


class ImageRewardScorer:
    """The head on the text encoder's first token, which has looked at the image; then normalised."""

    unit = UNIT

    def __init__(
        self,
        vision: Any,
        text: Any,
        head: Any,
        tokenizer: Any,
        encoder: str,
        device: str | torch.device = "cpu",
        batch_size: int = 32,
    ) -> None:
        from ._preprocess import Preprocessing

        self.vision, self.text, self.head = (
            module.to(device).eval().requires_grad_(False) for module in (vision, text, head)
        )
        size = vision.config.image_size
        self.preprocess = Preprocessing(size, crop=size)
        self.tokenizer, self.encoder, self.device, self.batch_size = tokenizer, encoder, device, batch_size

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Rewards (B,) of images (B, 3, H, W). RewardError where one is not finite."""
        from ._scoring import score_in_batches

        return score_in_batches(self._score, images, prompts, self.encoder, self.batch_size)

    def _score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        patches = self.vision(pixel_values=self.preprocess(images, self.device)).last_hidden_state
        texts = [prompt.text for prompt in prompts]
        tokens = self.tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
        output = self.text(
            input_ids=tokens.input_ids.to(self.device),
            attention_mask=tokens.attention_mask.to(self.device),
            encoder_hidden_states=patches,
        )
        return (self.head(output.last_hidden_state[:, 0]).squeeze(-1) - MEAN) / STD
