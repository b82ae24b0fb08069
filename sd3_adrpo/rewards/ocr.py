"""OCR reward: how close the text that is read in an image is to the text that its prompt asks for.

The score is Flow-GRPO's (arXiv 2505.05470): without white space and in lower case, 1 - min(d, n) / n, where d is the
Levenshtein distance of the text read and the target of n characters, and d = 0 where the target is a part of what was
read. The reader is another one: rapidocr with PP-OCR's models, which come in its wheel.
"""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..errors import UserError
from ..prompts import Prompt
from ._images import quantise

if TYPE_CHECKING:
    import torch
    from torch import Tensor

QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”|«([^»]+)»|「([^」]+)」')


@dataclass
class OcrReward:
    """1 - normalised edit distance of the text read in the image and the prompt's quoted text; needs the extra `ocr`.

    The target is a record's `text`, else the first text in double quotes. A prompt without one scores 0.
    """

    name: Literal["ocr"] = "ocr"
    short_side: int = 736  # pixels that smaller images are enlarged to before text is looked for; less is faster

    def describe(self) -> str:
        if importlib.util.find_spec("rapidocr") is None or importlib.util.find_spec("onnxruntime") is None:
            raise UserError('the ocr reward needs rapidocr and onnxruntime: pip install -e ".[ocr]"')
        if self.short_side < 32:
            raise UserError(f"the ocr reward's short_side is {self.short_side}; it must be at least 32 pixels")
        return "1 - normalised edit distance, rapidocr"

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """UserError where no prompt asks for a text: every score would be 0."""
        if not any(target_of(prompt) for prompt in prompts):
            raise UserError(
                f"the ocr reward finds no text to read in any of {len(prompts)} prompts, such as {prompts[0].text!r}: "
                'put it into double quotes, as in: a sign that says "OPEN" (prompts/ocr.txt has some)'
            )

    def load(self, device: str | torch.device = "cpu") -> OcrScorer:
        """On the CPU, whatever the device. UserError where rapidocr is not installed."""
        self.describe()
        from rapidocr import RapidOCR

        options = {"Global.log_level": "error", "Global.use_cls": False, "Global.text_score": 0.0}
        reader = RapidOCR(params={**options, "Det.limit_side_len": self.short_side})

        def read(image) -> str:
            return "".join(reader(image).txts or ())

        return OcrScorer(read)


def target_of(prompt: Prompt) -> str | None:
    """The text that the image should show."""
    text = (prompt.metadata or {}).get("text")
    if isinstance(text, str) and text.strip():
        return text
    found = QUOTED.search(prompt.text)
    return next((group for group in found.groups() if group), None) if found else None


def similarity(read: str, target: str) -> float:
    """In [0, 1]; 1 where the target is read, with or without other text around it."""
    read, target = ("".join(text.split()).lower() for text in (read, target))
    if not target:
        return 0.0
    distance = 0 if target in read else edit_distance(read, target)
    return 1 - min(distance, len(target)) / len(target)


def edit_distance(first: str, second: str) -> int:
    """Levenshtein's: insertions, deletions and substitutions that make one the other."""
    row = list(range(len(second) + 1))
    for i, letter in enumerate(first, 1):
        above, row = row, [i]
        for j, other in enumerate(second, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (letter != other)))
    return row[-1]


class OcrScorer:
    unit, encoder = "1 - normalised edit distance", "rapidocr (PP-OCR)"

    def __init__(self, read: Callable) -> None:
        """`read` maps an image, an array uint8 (H, W, 3) in blue, green, red, to its text."""
        self.read, self.warned = read, False

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Rewards (B,) of images (B, 3, H, W) in [0, 1], or uint8; 0 for a prompt without a text to show."""
        import torch

        targets = [target_of(prompt) for prompt in prompts]
        if None in targets and not self.warned:
            self.warned = True
            missing = prompts[targets.index(None)].text
            warnings.warn(f"the ocr reward is 0 for prompts without text in double quotes: {missing!r}", stacklevel=2)
        pixels = quantise(images).flip(1).permute(0, 2, 3, 1).contiguous().cpu().numpy()
        scores = [
            similarity(self.read(image), target) if target else 0.0
            for image, target in zip(pixels, targets, strict=True)
        ]
        return torch.tensor(scores)
