"""CLIP reward: 100 x cosine of image and prompt, by any model of open_clip. CLIPScore is arXiv 2104.08718."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import RewardError, UserError
from ..prompts import Prompt
from ._images import quantise

if TYPE_CHECKING:  # every command reads these options, few need the libraries
    import torch
    from torch import Tensor


@dataclass
class ClipReward:
    """100 x cosine of image and prompt, by a model of open_clip.

    A model's name needs `pretrained`. For OpenAI's own weights as a file take the name with -quickgelu; for their tag
    that is done here.
    """

    name: Literal["clip"] = "clip"
    model: str = "shapes"  # "shapes" (built in), a folder in open_clip's format, or a name that open_clip knows
    pretrained: str | None = None  # with a name: one of its tags, or the path of a weight file

    def load(self, device: str | torch.device = "cpu") -> ClipScorer:
        """float32 and in evaluation mode, on `device`. UserError says what is missing."""
        import open_clip

        source, encoder, quick_gelu = self._source(open_clip)
        try:
            # without the last option open_clip goes on with random weights
            model, _, transform = open_clip.create_model_and_transforms(
                source, self.pretrained, device=device, force_quick_gelu=quick_gelu, require_pretrained=True
            )
            tokenizer = open_clip.get_tokenizer(source)
        except Exception as error:  # open_clip, the hub and torch each have their own
            raise UserError(f"the CLIP {encoder} does not load: {error}") from error
        return ClipScorer(model, transform, tokenizer, encoder, device)

    def describe(self) -> str:
        """UserError where the model is not there or not known."""
        if self.model == "shapes" and not self.pretrained:
            from ..shapes import CLIP_DIR

            if not (CLIP_DIR / "open_clip_config.json").is_file():
                raise UserError(
                    f"the built-in CLIP's weights are not in {CLIP_DIR}: get them with the repository, or make them "
                    "with `python -m sd3_adrpo.shapes.pretrain`; or give another reward.model"
                )
            return "100 x cosine, built-in CLIP"
        import open_clip  # late: takes seconds

        return f"100 x cosine, {self._source(open_clip)[1]}"

    def _source(self, open_clip: Any) -> tuple[str, str, bool]:
        """open_clip's name for the model, ours for people, and whether the weights need QuickGELU."""
        folder = Path(self.model).expanduser()
        if self.pretrained and (self.model == "shapes" or folder.is_dir() or ":" in self.model):
            raise UserError(
                f"reward.pretrained is {self.pretrained!r}, but {self.model} has its own weights: leave it out"
            )
        if self.model == "shapes":
            from ..shapes import CLIP_DIR  # late: the built-in world is not needed for other models

            return f"local-dir:{CLIP_DIR}", "shapes", False
        if folder.is_dir():
            return f"local-dir:{folder}", self.model, False
        if self.model.startswith(("hf-hub:", "local-dir:")):
            return self.model, self.model, False
        known = open_clip.list_models()
        if self.model not in known:
            near = difflib.get_close_matches(self.model, known, n=3, cutoff=0.4)
            raise UserError(
                f'reward.model is {self.model!r}; allowed are "shapes", a folder with an open_clip_config.json, and '
                f"the names of open_clip.list_models(){', such as ' + ', '.join(near) if near else ''}"
            )
        tags = open_clip.list_pretrained_tags_by_model(self.model)
        file = self.pretrained is not None and Path(self.pretrained).is_file()
        if not file and self.pretrained not in tags:
            raise UserError(
                f"reward.pretrained is {self.pretrained!r}; {self.model} needs the path of a weight file, or one of "
                f"its tags: {', '.join(tags) or 'it has none'}"
            )
        config = {} if file else open_clip.get_pretrained_cfg(self.model, self.pretrained)
        name = Path(self.pretrained).name if file else self.pretrained
        return self.model, f"{self.model}/{name}", bool(config.get("quick_gelu"))


class ClipScorer:
    """Scores what a user would save: images are rounded to 8 bits first. Both embeddings are of length 1.

    Preprocessing is open_clip's own transform, run on 8-bit tensors on the device instead of on PIL images: an image of
    the model's size gives the same numbers, a resized one differs by rounding, at most 1/255 per value before
    normalisation.
    """

    unit = "100 x cosine"

    def __init__(
        self, model: Any, transform: Any, tokenizer: Callable, encoder: str, device: str | torch.device
    ) -> None:
        self.model = model.eval().requires_grad_(False)  # open_clip returns it in training mode
        self.transform, self.tokenizer, self.encoder, self.device = transform, tokenizer, encoder, device
        self._texts: dict[str, Tensor] = {}

    def preprocess(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], or uint8, to the model's input (B, 3, h, w)."""
        import torch
        from torchvision.transforms import CenterCrop, Resize
        from torchvision.transforms.functional import to_pil_image

        images = quantise(images)
        *geometry, convert_mode, to_tensor, normalise = self.transform.transforms
        if all(isinstance(step, Resize | CenterCrop) for step in geometry):
            images = images.to(self.device)
            for step in geometry:
                images = _resize(images, step) if isinstance(step, Resize) else step(images)
            return normalise(images.float() / 255)
        # a few models (not square, or padded) resize in a way that open_clip has for PIL images only
        return torch.stack([self.transform(to_pil_image(image)) for image in images.cpu()]).to(self.device)

    def embed_images(self, images: Tensor, batch_size: int = 64) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], or uint8, to (B, E) on the scorer's device; NaN for an image with a NaN."""
        import torch

        with torch.no_grad():
            parts = [
                self.model.encode_image(self.preprocess(part), normalize=True) for part in images.split(batch_size)
            ]
        embeddings = torch.cat(parts).float()
        if images.is_floating_point():  # rounding to 8 bits has turned a NaN into some number
            broken = ~images.flatten(1).isfinite().all(1).to(embeddings.device)
            embeddings = embeddings.masked_fill(broken[:, None], float("nan"))
        return embeddings

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """(N, E) on the scorer's device; every text is computed once.

        And alone: in a batch its last digits would depend on the others, which a resumed run asks for in another order.
        """
        import torch

        with torch.no_grad():
            for text in dict.fromkeys(texts):
                if text not in self._texts:
                    tokens = self.tokenizer([text]).to(self.device)
                    self._texts[text] = self.model.encode_text(tokens, normalize=True).float()[0]
        return torch.stack([self._texts[text] for text in texts])

    def score(self, embeddings: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Rewards (B,) of image embeddings (B, E), float32 on the CPU. RewardError where one is no finite number."""
        rewards = 100 * (embeddings * self.embed_texts([prompt.text for prompt in prompts])).sum(-1).cpu()
        bad = (~rewards.isfinite()).nonzero().flatten().tolist()
        if bad:
            names = list(dict.fromkeys(repr(prompts[row].text) for row in bad))
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise RewardError(
                f"the reward is {rewards[bad[0]].item()} for {len(bad)} of {len(rewards)} images, with the prompts "
                f"{', '.join(names[:3])}{more}: it must be finite. If the images are broken, lower "
                "train.learning_rate or take mixed_precision bf16 or no; else check the weights of " + self.encoder
            )
        return rewards

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Rewards (B,) of images (B, 3, H, W) in [0, 1] and their prompts, in points of 100 x cosine."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images came with {len(prompts)} prompts; each image needs its own")
        return self.score(self.embed_images(images), prompts)


def _resize(images: Tensor, step: Any) -> Tensor:
    """torchvision's Resize on uint8 images, the width first and then the height, as PIL does: both end in 8 bits.

    At once, a bicubic overshoot next to a hard edge is clipped once instead of twice, which differs by up to 14/255.
    """
    from torchvision.transforms.functional import resize

    height, width = step(images[:1, :1]).shape[-2:]
    for size in ([images.shape[-2], width], [height, width]):
        images = resize(images, size, step.interpolation, antialias=True)
    return images
