"""What eval/evaluate.py measures on request: `--metrics vendi,cmmd`.

By prompt: vendi, dino_diversity, lpips_diversity. By image, of a LoRA: velocity_norm_ratio. Distances of all images
from others, the base's unless a folder of images is given: cmmd, kid, fid, precision, recall.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:  # the command line needs the names only
    from torch import Tensor

BY_PROMPT = ("vendi", "dino_diversity", "lpips_diversity")
BY_IMAGE = ("velocity_norm_ratio",)
DISTANCES = ("cmmd", "kid", "fid", "precision", "recall")
NAMES = BY_PROMPT + BY_IMAGE + DISTANCES
IMAGES = (".png", ".jpg", ".jpeg", ".webp")


def parse_names(text: str | None) -> tuple[str, ...]:
    """Names between commas. UserError for one that is not known."""
    names = tuple(name.strip() for name in (text or "").split(",") if name.strip())
    for name in names:
        if name not in NAMES:
            raise UserError(f"metrics: {name!r} is not known; allowed are {', '.join(NAMES)}")
    return names


def by_prompt(
    names: Sequence[str], images: Tensor, prompt: Tensor, embeddings: Tensor | None, dino: str, device: str
) -> dict[str, Tensor]:
    """Values (N,) of those of `names` that are measured by prompt; `images` (B, 3, H, W) uint8, `prompt` (B,)."""
    found = {}
    if "vendi" in names:
        from .metrics.vendi import vendi

        found["vendi"] = vendi(_needed(embeddings, "vendi"), prompt)
    if "dino_diversity" in names:
        from .metrics.dino import load_dino
        from .metrics.diversity import pairwise_diversity

        found["dino_diversity"] = pairwise_diversity(load_dino(dino, device).embed_images(images), prompt)
    if "lpips_diversity" in names:
        from .metrics.lpips_diversity import load_lpips, lpips_diversity

        found["lpips_diversity"] = lpips_diversity(images, prompt, load_lpips(device), device)
    return found


def set_distances(names: Sequence[str], x: Tensor, y: Tensor) -> dict[str, float]:
    """Those of `names` that compare two sets, by features x (n, E) of the images and y (m, E) of the reference."""
    from .metrics import distances

    found = {name: getattr(distances, name)(x, y) for name in names if name in ("cmmd", "kid", "fid")}
    pair = dict(zip(("precision", "recall"), distances.precision_recall(x, y), strict=True))
    return found | {name: pair[name] for name in names if name in pair}


def check_reference(folder: Path) -> list[Path]:
    """Image files of a folder in order. UserError where there are under two."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES) if folder.is_dir() else []
    if len(files) < 2:
        kinds = ", ".join(IMAGES)
        raise UserError(f"reference_images {folder} has {len(files)} images ({kinds}): at least two are needed")
    return files


def embed_files(files: Sequence[Path], embedder: Any) -> Tensor:
    """(n, E) of image files, which may be of different sizes."""
    import numpy as np
    import torch
    from PIL import Image

    parts = []
    for path in files:
        with Image.open(path) as picture:
            pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
        parts.append(embedder.embed_images(pixels[None]))
    return torch.cat(parts).cpu()


def _needed(value: Any, name: str) -> Any:
    if value is None:
        raise UserError(f"{name} needs image embeddings: give a CLIP by embedder and embedder_pretrained")
    return value
