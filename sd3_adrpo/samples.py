"""The images of an evaluation and what each was worth, in a form that people and the report can open.

samples/samples.json             prompts, categories and every metric's values, before and after
samples/before/0007-02.webp      third image of the eighth prompt; the same name under after/ has the same noise
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:  # the report reads samples without torch
    from torch import Tensor

    from .evaluation import Evaluation, Measurement

FOLDER, VALUES = "samples", "samples.json"
LOSSLESS = 128  # pixels: up to here an image is stored exactly, and still takes a few kB only
QUALITY = 92


def save_samples(evaluation: Evaluation, folder: str | Path) -> Path:
    """Writes `folder`/samples; the values last, so that a samples.json stands for a whole folder."""
    root = Path(folder) / FOLDER
    before, after = evaluation.before, evaluation.after
    data: dict[str, Any] = {
        "prompts": before.prompts,
        "categories": before.categories,
        "images_per_prompt": len(before.prompt) // len(before.prompts),
    }
    for name, measured in (("before", before), ("after", after)):
        data[name] = None if measured is None else _values(measured)
        if measured is not None:
            _save_images(measured.images, data["images_per_prompt"], root / name)
    path = root / VALUES
    path.write_text(json.dumps(data, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    return path


def load_samples(folder: str | Path) -> dict[str, Any] | None:
    """What `save_samples` wrote, None where it did not: values of images are of length N K, those of prompts N."""
    path = Path(folder) / FOLDER / VALUES
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def image_path(folder: str | Path, phase: str, prompt: int, number: int) -> Path:
    """`phase` is "before" or "after"."""
    return Path(folder) / FOLDER / phase / _name(prompt, number)


def _name(prompt: int, number: int) -> str:
    return f"{prompt:04}-{number:02}.webp"


def _values(measured: Measurement) -> dict[str, list[float | None]]:
    rows = {name: measured.values(name).tolist() for name in (*measured.metrics, "free_diversity_weight")}
    return {name: [None if math.isnan(value) else value for value in values] for name, values in rows.items()}


def _save_images(images: Tensor, per_prompt: int, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for row, image in enumerate(images):
        small = max(image.shape[1:]) <= LOSSLESS
        picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
        picture.save(folder / _name(*divmod(row, per_prompt)), lossless=small, quality=QUALITY)
