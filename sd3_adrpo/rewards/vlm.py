"""A rating by any model behind an OpenAI-compatible address: OpenAI, vLLM, llama.cpp, Ollama, LM Studio."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..prompts import Prompt
from .clip import RewardError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

QUESTION = (
    'How well does this image show "{prompt}"? Rate it from 0 (not at all) to 10 (everything is right), by what is in '
    "the image. Answer with the number alone."
)


@dataclass
class VlmReward:
    """The rating that a vision-language model answers, asked over http."""

    name: Literal["vlm"] = "vlm"
    url: str = "http://127.0.0.1:8000/v1"  # the address that /chat/completions follows
    model: str = "default"  # as the server names it
    question: str = QUESTION  # {prompt} stands for the prompt
    pattern: str = r"-?\d+(?:\.\d+)?"  # finds the rating: its first group, else the whole; the last match counts
    lowest: float = 0.0  # ratings outside of lowest and highest count as not understood
    highest: float = 10.0
    max_tokens: int = 64  # of an answer
    temperature: float = 0.0
    api_key_env: str = "OPENAI_API_KEY"  # the environment variable that holds the key; unset: no key is sent
    timeout: float = 60.0  # seconds for a request
    retries: int = 4  # further attempts after an error, or at temperature > 0 after no rating
    backoff: float = 1.0  # seconds before the first retry; doubles each time, up to 60
    concurrency: int = 8  # requests at a time

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"reward.url is {self.url!r}; it must begin with http:// or https://")
        if "{prompt}" not in self.question:
            raise ValueError(f"reward.question is {self.question!r}; it must hold {{prompt}}, where the prompt goes")
        if self.highest <= self.lowest:
            raise ValueError(f"reward.highest is {self.highest}; it must be more than reward.lowest, {self.lowest}")
        if self.timeout <= 0 or self.concurrency < 1 or self.retries < 0 or self.backoff < 0:
            raise ValueError(
                f"reward.timeout is {self.timeout}, concurrency {self.concurrency}, retries {self.retries}, backoff "
                f"{self.backoff}; the first must be positive, the second 1 or more, the others not negative"
            )
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"reward.pattern is {self.pattern!r}, no regular expression: {error}") from None

    def unit(self) -> str:
        return f"rating, {self.lowest:g} to {self.highest:g}"

    def describe(self) -> str:
        return f"{self.unit()}, {self.model} at {self.url}"

    def load(self, device: str | torch.device = "cpu") -> VlmScorer:
        """Asks the server nothing yet. The key is read here and is never written anywhere."""
        return VlmScorer(self, os.environ.get(self.api_key_env))


@dataclass
class VlmScorer:
    """Asks once per image; `parse_failures` counts the images whose answers held no rating after all retries.

    Those take the mean rating of the other images of their prompt in the batch, or of the whole batch where there is
    none: no advantage either way. That is no 0, which a model may well answer. If no image has a rating it is an error.
    """

    config: VlmReward
    key: str | None = field(default=None, repr=False)
    parse_failures: int = 0

    def __post_init__(self) -> None:
        self.unit, self.encoder = self.config.unit(), f"{self.config.model} at {self.config.url}"

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Rewards (B,) of images (B, 3, H, W). RewardError where the server does not answer, or never with a rating."""
        from ._scoring import score_in_batches

        return score_in_batches(self._score, images, prompts, self.encoder, max(len(images), 1))

    def _score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        import torch

        with ThreadPoolExecutor(self.config.concurrency) as pool:
            ratings = list(pool.map(self.rate, images.cpu(), [prompt.text for prompt in prompts]))
        rewards = torch.tensor([float("nan") if rating is None else rating for rating in ratings])
        failed = rewards.isnan()
        if failed.any():
            self._fill(rewards, failed, prompts)
        return rewards

    def _fill(self, rewards: Tensor, failed: Tensor, prompts: Sequence[Prompt]) -> None:
        """Means in place of the ratings that are missing, and a word about it."""
        import torch

        count, total = int(failed.sum()), len(failed)
        self.parse_failures += count
        if count == total:
            raise RewardError(
                f"no answer of {self.encoder} to {total} images held a rating from {self.config.lowest:g} to "
                f"{self.config.highest:g}: try the question by hand, then change reward.question, pattern or max_tokens"
            )
        warnings.warn(f"{count} of {total} answers of {self.encoder} held no rating: they count as mean", stacklevel=4)
        known = ~failed
        for row in failed.nonzero().flatten().tolist():
            same = known & torch.tensor([prompt.text == prompts[row].text for prompt in prompts])
            rewards[row] = rewards[same if same.any() else known].mean()

    def rate(self, image: Tensor, text: str) -> float | None:
        """The rating of a uint8 image (3, H, W), or None where no answer had one."""
        from ._post import Unanswered, post_json

        url, body = self.config.url.rstrip("/") + "/chat/completions", self.request(image, text)
        for attempt in range(self.config.retries + 1):
            try:
                answer = post_json(url, body, self.key, self.config.timeout, self.config.retries, self.config.backoff)
            except Unanswered as error:
                raise RewardError(f"{error}. The run can be resumed; prompt {text!r}") from error
            rating = self.parse(answer)
            if rating is not None or self.config.temperature == 0:  # the same question would have the same answer
                return rating
            body["seed"] = attempt + 1
        return None

    def request(self, image: Tensor, text: str) -> dict[str, Any]:
        """The body of the request: one message with the question and the image as a PNG."""
        import base64
        import io

        from torchvision.transforms.functional import to_pil_image

        png = io.BytesIO()
        to_pil_image(image).save(png, "PNG")
        link = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
        question = self.config.question.replace("{prompt}", text)
        content = [{"type": "text", "text": question}, {"type": "image_url", "image_url": {"url": link}}]
        return {
            "model": self.config.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.config.max_tokens,
            "temperature": self.config.temperature,
        }

    def parse(self, answer: Any) -> float | None:
        """The last rating of the answer's text that lies within the scale, or None where there is none."""
        try:
            text = answer["choices"][0]["message"]["content"]
            found = list(re.finditer(self.config.pattern, text))
            rating = float(found[-1][1] if found[-1].re.groups else found[-1][0])
        except (KeyError, IndexError, TypeError, ValueError):
            return None
        return rating if self.config.lowest <= rating <= self.config.highest else None
