"""GenEval's folder layout (Ghosh et al., arXiv 2310.11513), so that its own scorer can be run on our images.

00000/metadata.jsonl        the prompt's record, as in GenEval's evaluation_metadata.jsonl
00000/samples/0000.png      its images
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from .errors import UserError
from .prompts import Prompt

if TYPE_CHECKING:
    from torch import Tensor


def check_geneval(prompts: Sequence[Prompt], folder: Path) -> None:
    """UserError where a prompt is not GenEval's, or the folder holds something: its scorer would score that too."""
    missing = next((prompt.text for prompt in prompts if not prompt.metadata), None)
    if missing is not None:
        raise UserError(
            f"geneval_dir: {missing!r} has no GenEval record: give GenEval's evaluation_metadata.jsonl as --prompts"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"geneval_dir {folder} is not empty: give a new folder")


def write_geneval(prompts: Sequence[Prompt], images: Tensor, folder: Path) -> None:
    """`images` (N K, 3, H, W) uint8, those of a prompt in a row."""
    number = len(images) // len(prompts)
    for row, prompt in enumerate(prompts):
        samples = folder / f"{row:05}" / "samples"
        samples.mkdir(parents=True)
        (samples.parent / "metadata.jsonl").write_text(json.dumps(prompt.metadata) + "\n", encoding="utf-8")
        for index in range(number):
            pixels = images[row * number + index].permute(1, 2, 0).cpu().numpy()
            Image.fromarray(pixels).save(samples / f"{index:04}.png")
