"""Objects in images by a DETR or a Mask2Former of transformers, and where they stand to each other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels; right and bottom are the first outside
MOST_INSTANCES = 100  # of an image, as mmdet keeps
POSITION_MARGIN = 0.1  # of the objects' sizes: closer centres stand in no relation


@dataclass(frozen=True)
class Detection:
    label: int
    score: float
    box: Box
    mask: Tensor | None = None  # (H, W), bool; None for detectors of boxes


def detections(
    model: Any, processor: Any, images: Tensor, threshold: float, device: str | torch.device
) -> list[list[Detection]]:
    """Per image of uint8 (B, 3, H, W), its objects with a confidence over `threshold`."""
    size = tuple(images.shape[-2:])
    inputs = processor(images=list(images), return_tensors="pt").to(device)
    outputs = model(pixel_values=inputs["pixel_values"], pixel_mask=inputs["pixel_mask"])
    if hasattr(outputs, "masks_queries_logits"):
        padded = tuple(inputs["pixel_values"].shape[-2:])
        inner = [(int(mask.any(1).sum()), int(mask.any(0).sum())) for mask in inputs["pixel_mask"]]
        logits = zip(outputs.class_queries_logits, outputs.masks_queries_logits, inner, strict=True)
        return [_instances(classes, masks, padded, part, size, threshold) for classes, masks, part in logits]
    found = processor.post_process_object_detection(outputs, threshold=threshold, target_sizes=[size] * len(images))
    rows = [zip(*(image[key].tolist() for key in ("labels", "scores", "boxes")), strict=True) for image in found]
    return [[Detection(label, score, tuple(box)) for label, score, box in row] for row in rows]


def _instances(
    classes: Tensor,
    masks: Tensor,
    padded: tuple[int, int],
    inner: tuple[int, int],
    size: tuple[int, int],
    threshold: float,
) -> list[Detection]:
    """From Mask2Former's logits (Q, C + 1) and (Q, h, w), as mmdet reads them and GenEval with it:

    the 100 likeliest pairs of query and class; masks in the image's pixels, positive logits; a score is the class's
    probability times the mean probability of the mask's pixels. `inner` is the input without its padding.
    """
    import torch
    from torch.nn.functional import interpolate

    probabilities = classes.softmax(-1)[:, :-1]
    scores, flat = probabilities.flatten().topk(min(MOST_INSTANCES, probabilities.numel()))
    rows = torch.div(flat, probabilities.shape[1], rounding_mode="floor")
    found = []
    for row, label, score in zip(rows, flat % probabilities.shape[1], scores.tolist(), strict=True):
        if score <= threshold:  # the mask's factor is at most 1
            break
        logits = interpolate(masks[row][None, None], padded, mode="bilinear")[..., : inner[0], : inner[1]]
        logits = interpolate(logits, size, mode="bilinear")[0, 0]
        mask = logits > 0
        if not mask.any():
            continue
        score *= logits[mask].sigmoid().mean().item()
        if score > threshold:
            found.append(Detection(int(label), score, _box(mask), mask))
    return found


def _box(mask: Tensor) -> Box:
    across, down = mask.any(0).nonzero().flatten(), mask.any(1).nonzero().flatten()
    return across[0].item(), down[0].item(), across[-1].item() + 1, down[-1].item() + 1


def relations(box: Box, other: Box) -> set[str]:
    """Where `box` stands to `other`: of "left of", "right of", "above", "below", none, one or two.

    GenEval's rule: with d the offset of the centres and s the sum of the sizes, each axis has
    max(|d| - 0.1 s, 0) sign(d) / ||d||, and what is over 0.5 is a relation.
    """
    offset, shares = [], []
    for axis in (0, 1):
        (start, end), (start2, end2) = (box[axis], box[axis + 2]), (other[axis], other[axis + 2])
        distance = (start + end - start2 - end2) / 2
        beyond = max(abs(distance) - POSITION_MARGIN * (abs(end - start) + abs(end2 - start2)), 0)
        offset.append(distance)
        shares.append(math.copysign(beyond, distance))
    length = math.hypot(*offset)
    if all(abs(share) < 1e-3 for share in shares):
        return set()
    names = (("left of", "right of"), ("above", "below"))
    pairs = zip(names, shares, strict=True)
    return {name[share > 0] for name, share in pairs if abs(share / length) > 0.5}
