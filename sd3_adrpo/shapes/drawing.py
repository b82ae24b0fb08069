"""Draws scenes: 64 x 64 pixels, anti-aliased from signed distances, a whole batch at once.

What the prompt leaves open is drawn at random, so that two images of one prompt differ: the background, every position,
and the sizes that are not named. Centres lie on a lattice of 8 pixels, the autoencoder's stride, and radii take four
values: a transformer of three million weights then draws sharp edges after an hour on two cores instead of a day.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .grammar import COLOURS, MAX_OBJECTS, SHAPES, STYLES, Scene

SIZE = 64  # pixels
PALETTE = torch.tensor(
    [
        [0.88, 0.10, 0.12],  # red
        [0.98, 0.52, 0.05],  # orange
        [0.97, 0.90, 0.10],  # yellow
        [0.12, 0.65, 0.20],  # green
        [0.10, 0.80, 0.85],  # cyan
        [0.12, 0.25, 0.88],  # blue
        [0.52, 0.12, 0.75],  # purple
        [0.97, 0.45, 0.72],  # pink
    ]
)
OUTLINE = 2.2  # pixels
STRIPE = 6.0  # pixels from stripe to stripe
STRIPE_SHADE = 0.4  # brightness of the dark stripes
LATTICE = 8  # pixels
SMALL, LARGE = (6.5,), (11.5,)  # radii in pixels; `SIZE_BOUNDARY` between them decides which word is right
SIZE_BOUNDARY = 9.0
STYLED = (9.5, 11.5)  # an outline or stripes need room
FREE = {
    1: (6.5, 8.0, 9.5, 11.5),
    2: (6.5, 8.0, 9.5, 11.5),
    3: (6.5, 8.0, 9.5),
    4: (6.5, 8.0),
}  # by objects in the scene
EXTENT = 1.1  # a shape of radius r fits into a circle of about this times r


@dataclass
class Layout:
    """N drawn scenes, up to four objects each. Tensors are (N, 4) unless said otherwise; sizes are in pixels."""

    shape: Tensor  # index into SHAPES
    colour: Tensor  # index into COLOURS
    style: Tensor  # index into STYLES
    present: Tensor  # bool
    radius: Tensor
    centre: Tensor  # (N, 4, 2), x to the right and y down
    background: Tensor  # (N, 3), RGB in [0, 1]
    relation: list[str | None]


def lay_out(scenes: list[Scene], generator: torch.Generator) -> Layout:
    """Draws the free attributes of each scene: radii, non-overlapping centres that obey the relation, background."""
    n = len(scenes)
    kind = torch.zeros(n, MAX_OBJECTS, 3, dtype=torch.long)
    radius = torch.ones(n, MAX_OBJECTS)
    pick = torch.rand(n, MAX_OBJECTS, generator=generator).tolist()
    present = torch.zeros(n, MAX_OBJECTS, dtype=torch.bool)
    for i, scene in enumerate(scenes):
        objects = [group for group in scene.groups for _ in range(group.count)]
        for j, group in enumerate(objects):
            kind[i, j] = torch.tensor(
                [SHAPES.index(group.shape), COLOURS.index(group.colour), STYLES.index(group.style)]
            )
            named = {"small": SMALL, "large": LARGE}.get(group.size)
            choices = named or (STYLED if group.style != "solid" else FREE[scene.count])
            radius[i, j] = choices[int(pick[i][j] * len(choices))]
            present[i, j] = True
    relations = [scene.relation for scene in scenes]
    grey = torch.empty(n, 1).uniform_(0.12, 0.9, generator=generator)
    tint = torch.empty(n, 3).uniform_(-0.05, 0.05, generator=generator)
    return Layout(
        *kind.unbind(-1),
        present=present,
        radius=radius,
        centre=_place(radius, present, relations, generator),
        background=(grey + tint).clamp(0, 1),
        relation=relations,
    )


def _place(radius: Tensor, present: Tensor, relations: list[str | None], generator: torch.Generator) -> Tensor:
    """Centres (N, 4, 2) by rejection: a few hundred candidates per scene at a time until every scene has one."""
    n = len(radius)
    centre = torch.zeros(n, MAX_OBJECTS, 2)
    direction = torch.zeros(n, 2)  # from the second object towards the first
    for i, relation in enumerate(relations):
        direction[i] = torch.tensor(
            {None: (0, 0), "left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}[relation]
        )
    todo = torch.arange(n)
    while len(todo):
        candidates, valid = _candidates(radius[todo], present[todo], direction[todo], generator)
        found, first = valid.max(dim=1)
        centre[todo[found]] = candidates[found, first[found]]
        todo = todo[~found]
    return centre


def _candidates(radius: Tensor, present: Tensor, direction: Tensor, generator: torch.Generator, tries: int = 192):
    """Random centres (N, tries, 4, 2), and which of them obey margins, gaps and relation (N, tries)."""
    margin = (EXTENT * radius + 0.5)[:, None, :, None]
    first, last = (margin / LATTICE).ceil(), ((SIZE - margin) / LATTICE).floor()
    unit = torch.rand(len(radius), tries, MAX_OBJECTS, 2, generator=generator)
    centre = LATTICE * (first + (unit * (last - first + 1)).floor())
    distance = (centre[:, :, :, None] - centre[:, :, None]).norm(dim=-1)
    needed = EXTENT * (radius[:, :, None] + radius[:, None]) + 2
    both = (present[:, :, None] & present[:, None]).triu(1)
    apart = ((distance >= needed[:, None]) | ~both[:, None]).flatten(2).all(-1)
    step = centre[:, :, 0] - centre[:, :, 1]
    along = (step * direction[:, None]).sum(-1)
    across = (step * direction[:, None].flip(-1)).sum(-1).abs()
    related = (along >= across + 4) | (direction == 0).all(-1)[:, None]
    return centre, apart & related


def signed_distance(shape: int, x: Tensor, y: Tensor) -> Tensor:
    """Distance to the outline of a shape of radius 1 at the origin, negative inside; y points down."""
    name = SHAPES[shape]
    if name == "circle":
        return torch.hypot(x, y) - 1
    x = x.abs()
    if name == "square":
        return torch.maximum(x, y.abs()) - 0.84
    if name == "triangle":
        slope = math.hypot(1.85, 1.05)
        return torch.maximum(y - 0.8, (1.85 * x - 1.05 * (y + 1.05)) / slope)
    if name == "diamond":
        return (x + y.abs() - 1.12) / math.sqrt(2)
    if name == "heart":
        return _heart(x, y)
    y = y.abs()
    arms = torch.maximum(torch.minimum(x, y) - 0.42, torch.maximum(x, y) - 1)
    return arms


def _heart(x: Tensor, y: Tensor) -> Tensor:
    """Exact distance to two half discs on a tilted square (the construction is I. Quilez's `sdHeart`)."""
    scale = 1.85
    x, y = x / scale, (0.98 - y) / scale
    lobe = torch.hypot(x - 0.25, y - 0.75) - math.sqrt(2) / 4
    along = 0.5 * (x + y).clamp(min=0)
    edge = torch.minimum(torch.hypot(x, y - 1), torch.hypot(x - along, y - along)) * torch.sign(x - y)
    return scale * torch.where(x + y > 1, lobe, edge)


def draw(layout: Layout, generator: torch.Generator | None = None) -> Tensor:
    """Images (N, 3, 64, 64) in [0, 1]. With a generator every object's colour varies a little."""
    n = len(layout.radius)
    grid = torch.arange(SIZE) + 0.5
    image = layout.background[:, :, None, None].expand(n, 3, SIZE, SIZE).clone()
    for j in range(MAX_OBJECTS):
        rows = layout.present[:, j].nonzero()[:, 0]
        if not len(rows):
            break
        radius = layout.radius[rows, j, None, None]
        x = grid[None, None, :] - layout.centre[rows, j, 0, None, None]
        y = grid[None, :, None] - layout.centre[rows, j, 1, None, None]
        distance = torch.empty(len(rows), SIZE, SIZE)
        for shape in range(len(SHAPES)):
            at = layout.shape[rows, j] == shape
            distance[at] = radius[at] * signed_distance(
                shape, *torch.broadcast_tensors(x[at] / radius[at], y[at] / radius[at])
            )
        style = layout.style[rows, j, None, None]
        outline = torch.maximum(distance, -distance - OUTLINE)
        cover = (0.5 - torch.where(style == 1, outline, distance)).clamp(0, 1)[:, None]
        stripe = (0.5 + (STRIPE / 4 - (y % STRIPE - STRIPE / 2).abs())).clamp(0, 1)
        shade = torch.where(style == 2, STRIPE_SHADE + (1 - STRIPE_SHADE) * stripe, torch.ones(()))[:, None]
        colour = PALETTE[layout.colour[rows, j]]
        if generator is not None:
            colour = (colour + torch.empty_like(colour).uniform_(-0.03, 0.03, generator=generator)).clamp(0, 1)
        image[rows] = image[rows] * (1 - cover) + cover * shade * colour[:, :, None, None]
    return image


def draw_scenes(scenes: list[Scene], generator: torch.Generator) -> Tensor:
    """Images (N, 3, 64, 64) in [0, 1], one of each scene."""
    return draw(lay_out(scenes, generator), generator)
