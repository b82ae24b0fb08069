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


def check(names: Sequence[str], reference: Path | None, images: int) -> list[Path]:
    """The reference's files. UserError for a reference that no metric looks at, or too few images to compare."""
    compared = [name for name in names if name in DISTANCES]
    if reference and not compared:
        raise UserError(
            f"reference_images {reference} is for the metrics {', '.join(DISTANCES)}: name some by --metrics"
        )
    if compared and images < 2:
        raise UserError(f"{compared[0]} compares sets of images: take more prompts or samples_per_prompt than {images}")
    return check_reference(reference) if reference else []


def prepare(names: Sequence[str], embedder: Any, dino: str, device: str) -> None:
    """Loads what `names` need, so that what is missing is said before an image is drawn. UserError."""
    for name in names:
        if name == "vendi" or name in DISTANCES:
            _needed(embedder, name)
    if "dino_diversity" in names:
        from .metrics.dino import load_dino

        load_dino(dino, device)
    if "lpips_diversity" in names:
        from .metrics.lpips_diversity import load_lpips

        load_lpips(device)


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


def compare_sets(
    names: Sequence[str], sides: dict[str, Any], reference: Tensor | None, embedder: Any
) -> dict[str, Any]:
    """Distances of `sides`, {"before", "after"} measurements, from the reference's features (m, E); without those, of
    "after" from "before". {} where `names` has none or there is nothing to compare."""
    names = [name for name in names if name in DISTANCES]
    features = {phase: embedder.embed_images(one.images).cpu() for phase, one in sides.items()} if names else {}
    of = "images" if reference is not None else "images of the base"
    if names and reference is None:
        reference = features.pop("before")
    if not features:
        return {}
    about = {"features": embedder.encoder, "reference": f"{len(reference)} {of}"}
    return about | {phase: set_distances(names, found, reference) for phase, found in features.items()}


def check_reference(folder: Path) -> list[Path]:
    """Image files of a folder in order. UserError where there are under two, or one is no image."""
    from PIL import Image

    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES) if folder.is_dir() else []
    if len(files) < 2:
        kinds = ", ".join(IMAGES)
        raise UserError(f"reference_images {folder} has {len(files)} images ({kinds}): at least two are needed")
    for path in files:  # their headers only
        try:
            Image.open(path).close()
        except OSError as error:
            raise UserError(f"reference_images: {path} is no image ({error}): take it out of the folder") from error
    return files


def embed_files(files: Sequence[Path], embedder: Any) -> Tensor:
    """(n, E) of image files, which may be of different sizes. UserError for one that is cut off."""
    import numpy as np
    import torch
    from PIL import Image

    parts = []
    for path in files:
        try:
            with Image.open(path) as picture:
                pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
        except OSError as error:
            raise UserError(f"reference_images: {path} cannot be read ({error}): copy it again") from error
        parts.append(embedder.embed_images(pixels[None]))
    return torch.cat(parts).cpu()


def _needed(value: Any, name: str) -> Any:
    if value is None:
        raise UserError(
            f"{name} needs image embeddings: give a CLIP by --embedder, and --embedder_pretrained with a name"
        )
    return value
