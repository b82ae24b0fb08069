"""Explains an object of the built-in world by the drawing's own model.

Every shape and style is fitted (centre, radius, colour) and the one that leaves the least squared error is the answer.
Legend: N objects, H hypotheses, P pixels of a window.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .drawing import OUTLINE, PALETTE, STRIPE, STRIPE_SHADE, signed_distance
from .grammar import COLOURS, SHAPES, STYLES

CONTRAST = 0.10  # RGB distance from the background at which a pixel belongs to an object: noise of 0.03 stays below
WINDOW = 32  # pixels: holds the largest object
SOFT = 1.6  # pixels from background to object across a fitted edge: sharp drawings and blurred ones both fit
FINALISTS = 2  # hypotheses per object that are refined
UNCLEAR = 0.35  # share of an object's energy: if the best explanation leaves more, the object has none of the shapes


@dataclass
class Found:
    """One object: its words, and radius and centre in pixels (x to the right, y down). `shape` may be "unclear"."""

    shape: str
    colour: str
    style: str
    radius: float
    x: float
    y: float


@dataclass
class Windows:
    """N square cut-outs with one object each."""

    image: Tensor  # index of the image (N,)
    pixels: Tensor  # RGB less background (N, 3, P)
    weight: Tensor  # 0 where another object is, else 1 (N, 1, P)
    background: Tensor  # (N, 3)
    x: Tensor  # pixel centres (N, P)
    y: Tensor
    box: Tensor  # left, top, right, bottom of the object in pixels (N, 4)

    def repeat(self, times: int) -> Windows:
        """Each object `times` over."""
        return Windows(*(value.repeat_interleave(times, 0) for value in vars(self).values()))


def explain(windows: Windows) -> tuple[list[Found], list[float]]:
    """The best shape, style, centre, radius and colour of each window, and the share of energy it leaves over."""
    n = len(windows.image)
    guess, error = _first_guess(windows.box), []
    for shape in range(len(SHAPES)):
        distance = _distance(torch.full((n,), shape), guess[:, shape], windows)
        for style in range(len(STYLES)):
            maps = _render(distance, torch.full((n,), style), guess[:, shape], windows)
            error.append(_fit_colour(maps, windows)[1])
    best = torch.stack(error, 1).topk(FINALISTS, largest=False).indices
    shape, style = best // len(STYLES), best % len(STYLES)
    guess = guess.gather(1, shape[..., None].expand(-1, -1, 3)).flatten(0, 1)
    colour, error, placed = _refine(shape.flatten(), style.flatten(), guess, windows.repeat(FINALISTS))

    error, first = error.view(n, FINALISTS).min(dim=1)
    at = torch.arange(n)
    colour, placed = (value.view(n, FINALISTS, 3)[at, first] for value in (colour, placed))
    left = (error / (windows.weight * windows.pixels.square()).sum((1, 2)).clamp(min=1e-6)).tolist()
    found = []
    for i, (x, y, radius) in enumerate(placed.tolist()):
        name = SHAPES[shape[i, first[i]]] if left[i] < UNCLEAR else "unclear"
        nearest = int((colour[i] - PALETTE).square().sum(-1).argmin())
        found.append(Found(name, COLOURS[nearest], STYLES[style[i, first[i]]], radius, x, y))
    return found, left


@lru_cache
def _extents() -> Tensor:
    """Left, top, right, bottom of each shape of radius 1 (S, 4)."""
    line = torch.linspace(-1.5, 1.5, 601)
    y, x = torch.meshgrid(line, line, indexing="ij")
    inside = [signed_distance(shape, x, y) <= 0 for shape in range(len(SHAPES))]
    return torch.stack([torch.stack([x[m].min(), y[m].min(), x[m].max(), y[m].max()]) for m in inside])


def _first_guess(box: Tensor) -> Tensor:
    """Centre and radius (N, S, 3) that would give each shape the object's bounding box (N, 4)."""
    halo = torch.tensor([0.7, 0.7, -0.7, -0.7])  # pixels of soft edge that `CONTRAST` still sees
    box, extents = (box + halo)[:, None], _extents()[None]
    radius = ((box[..., 2:] - box[..., :2]) / (extents[..., 2:] - extents[..., :2])).mean(-1, keepdim=True).clamp(min=2)
    middle = (box[..., 2:] + box[..., :2]) / 2 - radius * (extents[..., 2:] + extents[..., :2]) / 2
    return torch.cat([middle, radius], -1)


def _distance(shape: Tensor, placed: Tensor, windows: Windows) -> Tensor:
    """Signed distance in pixels (H, P) to the outlines of H shapes at `placed` (H, 3), which is x, y, radius."""
    radius = placed[:, 2:]
    x, y = (windows.x - placed[:, :1]) / radius, (windows.y - placed[:, 1:2]) / radius
    kinds = shape.unique().tolist()
    if len(kinds) == 1:
        return signed_distance(kinds[0], x, y) * radius
    distance = torch.empty_like(x)
    for kind in kinds:
        at = shape == kind
        distance[at] = signed_distance(kind, x[at], y[at])
    return distance * radius


def _render(distance: Tensor, style: Tensor, placed: Tensor, windows: Windows) -> Tensor:
    """Maps (H, 2, P): how much of each pixel the object covers times its brightness, and without the brightness."""
    outlined, striped = style == STYLES.index("outlined"), style == STYLES.index("striped")
    if outlined.any():
        distance = torch.where(outlined[:, None], torch.maximum(distance, -distance - OUTLINE), distance)
    cover = (0.5 - distance / SOFT).clamp(0, 1)
    maps = torch.stack([cover, cover], 1)
    if striped.any():
        y = windows.y[striped] - placed[striped, 1:2]
        bright = (0.5 + (STRIPE / 4 - (y % STRIPE - STRIPE / 2).abs()) / SOFT).clamp(0, 1)
        maps[striped, 0] *= STRIPE_SHADE + (1 - STRIPE_SHADE) * bright
    return maps


def _fit_colour(maps: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    """Least squares colour (H, 3) of `background (1 - cover) + colour light`, and the squared error left (H,).

    In closed form from a few sums over pixels, so that no image of a hypothesis is ever made.
    """
    weighted, back = windows.weight * maps, windows.background
    sums, gram = weighted @ windows.pixels.mT, weighted @ maps.mT  # (H, 2, 3), (H, 2, 2)
    energy = (windows.weight * windows.pixels.square()).sum((1, 2))
    target = energy + 2 * (sums[:, 1] * back).sum(-1) + gram[:, 1, 1] * back.square().sum(-1)
    onto, norm = sums[:, 0] + gram[:, 0, 1:] * back, gram[:, 0, 0].clamp(min=1e-3)
    return onto / norm[:, None], target - onto.square().sum(-1) / norm


def _refine(shape: Tensor, style: Tensor, placed: Tensor, windows: Windows) -> tuple[Tensor, Tensor, Tensor]:
    """Three Gauss-Newton steps on centre and radius. Returns colour (H, 3), error (H,) and placement (H, 3)."""
    width = 0.4  # pixels, of the finite differences: within a soft edge

    def look(at: Tensor) -> Tensor:
        return _render(_distance(shape, at, windows), style, at, windows)

    for _ in range(3):
        maps = look(placed)
        colour, _ = _fit_colour(maps, windows)
        basis = torch.stack([colour, -windows.background], 1)  # (H, 2, 3): pixels = maps * basis + what is left
        metric = basis @ basis.mT
        left = basis @ windows.pixels - metric @ maps  # (H, 2, P), projected on the basis
        moved = [look(placed + width * axis) for axis in torch.eye(3)]
        slope = torch.stack([one - maps for one in moved], 1).flatten(1, 2) / width  # (H, 3 * 2, P)
        weighted = windows.weight * slope
        normal = ((weighted @ slope.mT).unflatten(2, (3, 2)).unflatten(1, (3, 2)) * metric[:, None, :, None]).sum(
            (2, 4)
        )
        toward = (weighted.unflatten(1, (3, 2)) * left[:, None]).sum((2, 3))
        damping = 0.01 * normal.diagonal(dim1=1, dim2=2).mean(-1) + 1e-4
        step = torch.linalg.solve(normal + damping[:, None, None] * torch.eye(3), toward)
        placed = placed + step.clamp(-2, 2)
        placed[:, 2].clamp_(2, WINDOW / 2)
    return *_fit_colour(look(placed), windows), placed
