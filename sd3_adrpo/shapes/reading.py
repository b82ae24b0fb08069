"""Reads images of the built-in world: which objects they hold, and where.

A pure function of the pixels, nothing learned: what differs from the background falls into connected components, and
each is explained by the drawing's own model (fitting.py). Legend: B images, N objects, P pixels of a window.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from .drawing import SIZE
from .fitting import CONTRAST, WINDOW, Found, Windows, explain

CHROMA = 0.25  # max - min of RGB: objects have some pixels above it, backgrounds and their blotches have not
SPECK = 12  # pixels: fewer coloured ones than this are no object
DOUBTFUL = 0.10  # of the same: from here on, an object may be two that touch
CHUNK = 16  # images at a time: what a chunk needs fits into a processor's cache
INSIDE = np.zeros((3, 3, 3), dtype=bool)  # which of a pixel's neighbours in a stack of images it is connected to:
INSIDE[1] = ndimage.generate_binary_structure(2, 1)  # the four in its own image


def read(image: Tensor) -> tuple[list[Found], Tensor]:
    """Objects and background colour (3,) of one image (3, 64, 64) in [0, 1]."""
    return read_all(image[None])[0]


@torch.no_grad()
def read_all(images: Tensor) -> list[tuple[list[Found], Tensor]]:
    """`read` for a batch (B, 3, 64, 64), faster than one by one. ValueError for another size."""
    if images.ndim != 4 or images.shape[1:] != (3, SIZE, SIZE):
        raise ValueError(f"images of shape {tuple(images.shape)}: the verifier reads (B, 3, {SIZE}, {SIZE})")
    images = images.detach().float().cpu().nan_to_num(0.0).clamp(0, 1)
    return [result for chunk in images.split(CHUNK) for result in _read_chunk(chunk)]


def _read_chunk(images: Tensor) -> list[tuple[list[Found], Tensor]]:
    pixels = images.flatten(2)
    background = pixels[:, :, ::3].median(dim=-1).values  # objects never cover half an image
    near = ((pixels - background[:, :, None]).square().sum(1, keepdim=True) < CONTRAST**2).float()
    background = (pixels * near).sum(-1) / near.sum(-1).clamp(min=1)
    labels, kept = _components(images, background)
    results: list[tuple[list[Found], Tensor]] = [([], colour) for colour in background]
    if not kept:
        return results
    windows = _cut(images, background, labels, kept)
    found, left = explain(windows)
    for i, label in enumerate(kept):
        parts, error = [found[i]], left[i]
        if error > DOUBTFUL:
            parts = _split(images, background, labels, label, parts, error)
        results[int(windows.image[i])][0].extend(parts)
    return results


def _components(images: Tensor, background: Tensor) -> tuple[np.ndarray, list[int]]:
    """Connected components of B images, numbered from 1 in (B, 64, 64), and those large and coloured enough."""
    smooth = ndimage.gaussian_filter(images.numpy(), (0, 0, 0.6, 0.6))
    red, green, blue = smooth.swapaxes(0, 1)
    chroma = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
    difference = smooth - background.numpy()[:, :, None, None]
    apart = np.einsum("bchw,bchw->bhw", difference, difference) > CONTRAST**2
    labels, count = ndimage.label(apart, INSIDE)
    area = np.bincount(labels[apart & (chroma > CHROMA)], minlength=count + 1)
    return labels, [label for label in range(1, count + 1) if area[label] >= SPECK]


def _cut(images: Tensor, background: Tensor, labels: np.ndarray, kept: list[int]) -> Windows:
    """The window around each component of `kept`."""
    slices = ndimage.find_objects(labels)
    rows = []
    for label in kept:
        image, ys, xs = slices[label - 1]
        top, left = (min(max((s.start + s.stop - WINDOW) // 2, 0), SIZE - WINDOW) for s in (ys, xs))
        own = labels[image.start, top : top + WINDOW, left : left + WINDOW]
        pixels = images[image.start, :, top : top + WINDOW, left : left + WINDOW].numpy()
        free = ((own == label) | (own == 0)).astype(np.float32)
        rows.append((image.start, pixels, free, top, left, (xs.start, ys.start, xs.stop, ys.stop)))
    index, pixels, free, top, left, box = (torch.from_numpy(np.array(column)) for column in zip(*rows, strict=True))
    grid = torch.arange(WINDOW) + 0.5
    return Windows(
        image=index,
        pixels=pixels.flatten(2) - background[index][:, :, None],
        weight=free.flatten(1)[:, None],
        background=background[index],
        x=left[:, None] + grid.repeat(WINDOW),
        y=top[:, None] + grid.repeat_interleave(WINDOW),
        box=box.float(),
    )


def _split(
    images: Tensor, background: Tensor, labels: np.ndarray, label: int, whole: list[Found], error: float
) -> list[Found]:
    """Cuts a doubtful component at its necks. The parts, if they explain the pixels much better; else `whole`."""
    at = int(np.argwhere((labels == label).any((1, 2)))[0, 0])
    own = ndimage.binary_fill_holes(labels[at] == label)
    depth = ndimage.distance_transform_edt(own)
    best = whole
    for neck in (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0):  # half its width in pixels
        seeds, count = ndimage.label(depth > neck)
        if not 2 <= count <= 4:
            continue
        nearest = ndimage.distance_transform_edt(seeds == 0, return_distances=False, return_indices=True)
        parts = np.where(own, seeds[tuple(nearest)], 0)
        parts[(labels[at] > 0) & ~own] = count + 1  # the other objects
        found, left = explain(
            _cut(images[at : at + 1], background[at : at + 1], parts[None], list(range(1, count + 1)))
        )
        if max(left) < 0.5 * error:
            best, error = found, max(left)
    return best
