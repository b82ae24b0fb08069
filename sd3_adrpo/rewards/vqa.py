"""VQAScore: the probability that a vision-language model says "Yes" to "does this show it?" (arXiv 2404.01291)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..errors import UserError
from ..prompts import Prompt
from ._weights import check_source, loading

if TYPE_CHECKING:
    import torch
    from torch import Tensor

UNIT = "probability of the answer"


@dataclass
class VqaReward:
    """The probability of "Yes", 0 to 1, as the first token that a vision-language model answers to a question."""

    name: Literal["vqa"] = "vqa"
    model: str = "Qwen/Qwen2-VL-2B-Instruct"  # a folder or hub id, of an image-text-to-text model with a chat template
    question: str = 'Does this figure show "{prompt}"? Please answer Yes or No.'
    answer: str = "Yes"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on a GPU, float32 on the CPU
    batch_size: int = 8  # images per forward pass

    def __post_init__(self) -> None:
        if "{prompt}" not in self.question:
            raise ValueError(f"reward.question is {self.question!r}; it must hold {{prompt}}, where the prompt goes")

    def describe(self) -> str:
        check_source(self.model, "model")
        return f'{UNIT} "{self.answer}", {self.model}'

    def load(self, device: str | torch.device = "cpu") -> VqaScorer:
        """In evaluation mode, on `device`. UserError where the weights cannot be had or do not chat."""
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        small = self.dtype == "bfloat16" or (self.dtype == "auto" and torch.device(device).type != "cpu")
        with loading("model", self.model):
            model = AutoModelForImageTextToText.from_pretrained(self.model, dtype="bfloat16" if small else "float32")
            processor = AutoProcessor.from_pretrained(self.model)
        if not getattr(processor, "chat_template", None):
            raise UserError(f"reward.model {self.model} has no chat template: take a model that answers questions")
        return VqaScorer(model.to(device), processor, self, device)


class VqaScorer:
    """P(answer | image, question) at the first token of the answer, over the whole vocabulary."""

    def __init__(self, model: Any, processor: Any, config: VqaReward, device: str | torch.device = "cpu") -> None:
        self.model, self.processor = model.eval().requires_grad_(False), processor
        self.config, self.device = config, device
        self.unit, self.encoder = f'{UNIT} "{config.answer}"', config.model
        processor.tokenizer.padding_side = "left"  # so that the last position is the question's end in every row
        ids = processor.tokenizer.encode(config.answer, add_special_tokens=False)
        if len(ids) != 1 or ids[0] == processor.tokenizer.unk_token_id:
            raise UserError(
                f"reward.answer is {config.answer!r}, which is {len(ids)} tokens for {config.model}; it must be a "
                "single one that it knows, such as Yes or yes"
            )
        self.token = ids[0]

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Rewards (B,) of images (B, 3, H, W). RewardError where one is not finite."""
        from ._scoring import score_in_batches

        return score_in_batches(self._score, images, prompts, self.encoder, self.config.batch_size)

    def _score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        texts = [self.chat(prompt.text) for prompt in prompts]
        inputs = self.processor(text=texts, images=list(images.cpu()), padding=True, return_tensors="pt")
        inputs = inputs.to(self.device, dtype=self.model.dtype)
        logits = self.model(**inputs, logits_to_keep=1).logits[:, -1].float()
        return logits.softmax(-1)[:, self.token]

    def chat(self, text: str) -> str:
        """The question about one image in the model's own chat form, up to where its answer begins."""
        question = {"type": "text", "text": self.config.question.replace("{prompt}", text)}
        messages = [{"role": "user", "content": [{"type": "image"}, question]}]
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
