"""The built-in world's verifier as a reward: 1 where the image is what its prompt asks for, else 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..errors import RewardError, UserError
from ..prompts import Prompt

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass
class ShapesReward:
    """1 where a 64 x 64 image is what its prompt of the built-in world asks for, else 0; nothing in it is learned."""

    name: Literal["shapes"] = "shapes"

    def describe(self) -> str:
        return "1 right, 0 wrong, built-in verifier"

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """UserError for prompts that the world's grammar has not."""
        from ..shapes.grammar import parse

        outside = list(dict.fromkeys(repr(prompt.text) for prompt in prompts if parse(prompt.text) is None))
        if outside:
            more = f" and {len(outside) - 3} more" if len(outside) > 3 else ""
            raise UserError(
                f"the reward shapes cannot judge {', '.join(outside[:3])}{more}: it knows sentences like 'two red "
                "circles' or 'a small blue heart above a green cross' only. Take other prompts (prompts/shapes_*.csv), "
                "or another reward"
            )

    def load(self, device: str | torch.device = "cpu") -> ShapesScorer:
        return ShapesScorer()


class ShapesScorer:
    unit, encoder = "1 right, 0 wrong", "built-in verifier"

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Rewards (B,) of images (B, 3, 64, 64) in [0, 1], or uint8. RewardError for what has no answer."""
        import torch

        from ..shapes.drawing import SIZE
        from ..shapes.verifier import verify

        if images.shape[1:] != (3, SIZE, SIZE):
            raise RewardError(
                f"the reward shapes got images of {images.shape[-1]} x {images.shape[-2]}; it reads {SIZE} x {SIZE} "
                f"only: set rollout.height and rollout.width to {SIZE}"
            )
        images = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        answers = verify(images.cpu(), [prompt.text for prompt in prompts])
        if None in answers:
            raise RewardError(f"the reward shapes has no answer for {prompts[answers.index(None)].text!r}")
        return torch.tensor(answers, dtype=torch.float32)
