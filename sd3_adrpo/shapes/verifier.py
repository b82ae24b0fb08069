"""Whether an image of the built-in world is what its prompt asked for, and how varied the right images are.

Nothing in it is learned: `reading` says which objects the image holds, and they are compared with the prompt's scene.
`python -m sd3_adrpo.shapes.verifier` measures how often that is right.
"""

from __future__ import annotations

import random
import time
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import permutations

import torch
from scipy import ndimage
from torch import Tensor

from .drawing import LARGE, SIZE, SIZE_BOUNDARY, SMALL, draw_scenes, lay_out
from .grammar import Group, Scene, one_word_wrong, parse, random_scene
from .reading import Found, read, read_all

__all__ = [
    "Found",
    "assess",
    "assign",
    "free_attributes",
    "free_diversity",
    "free_spread",
    "matches",
    "measure",
    "read",
]
__all__ += ["read_all", "verify"]

DRAWN = 64  # layouts per prompt behind the reference of `free_diversity`


def _objects(scene: Scene) -> list[Group]:
    return [group for group in scene.groups for _ in range(group.count)]


def assign(scene: Scene, found: list[Found]) -> list[Found] | None:
    """The found objects in the order of the scene's; None if they are not the scene."""
    wanted = _objects(scene)
    if len(found) != len(wanted):
        return None
    return next((list(order) for order in permutations(found) if _agree(scene, wanted, order)), None)


def _agree(scene: Scene, wanted: list[Group], order: Sequence[Found]) -> bool:
    for group, one in zip(wanted, order, strict=True):
        size = "small" if one.radius < SIZE_BOUNDARY else "large"
        if (group.shape, group.colour, group.style) != (one.shape, one.colour, one.style) or group.size not in (
            None,
            size,
        ):
            return False
    if scene.relation is None:
        return True
    x, y = order[0].x - order[1].x, order[0].y - order[1].y
    along, across = {"left of": (-x, y), "right of": (x, y), "above": (-y, x), "below": (y, x)}[scene.relation]
    return along > 0 and along > abs(across)


def matches(scene: Scene, found: list[Found]) -> bool:
    """Whether the objects are the scene: every shape, colour, style and named size, count and relation, no extras."""
    return assign(scene, found) is not None


def verify(images: Tensor, prompts: Sequence[str]) -> list[bool | None]:
    """Whether each image (B, 3, H, W) in [0, 1] is what its prompt asks for.

    None where there is no answer: the prompt is outside the grammar, or the images are not 64 x 64.
    """
    return [answer for answer, _ in assess(images, prompts)]


def assess(images: Tensor, prompts: Sequence[str]) -> list[tuple[bool | None, Tensor | None]]:
    """`verify`'s answer and, of a right image, its `free_attributes`; each image is read once."""
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images and {len(prompts)} prompts: give one prompt per image")
    results: list[tuple[bool | None, Tensor | None]] = []
    for result in _judge(images, prompts):
        if result is None:
            results.append((None, None))
        else:
            results.append((result[1] is not None, None if result[1] is None else free_attributes(*result)))
    return results


def _judge(images: Tensor, prompts: Sequence[str]) -> Iterator[tuple[Scene, list[Found] | None, Tensor] | None]:
    """Per image: scene, objects in its order (None: not the scene) and background; None where there is no answer."""
    scenes = [parse(prompt) for prompt in prompts]
    if images.shape[1:] != (3, SIZE, SIZE):
        scenes = [None] * len(scenes)
    known = [i for i, scene in enumerate(scenes) if scene is not None]
    readings = iter(read_all(images[known]) if known else [])
    for scene in scenes:
        if scene is None:
            yield None
            continue
        found, background = next(readings)
        yield scene, assign(scene, found), background


def free_attributes(scene: Scene, found: list[Found], background: Tensor) -> Tensor:
    """What the prompt leaves open (k,): background RGB, then x / 64, y / 64 and, unless named, the radius per object.

    Radii are in units of the range of all radii (6.5 pixels). `found` are the scene's objects in any order; like ones
    come sorted from left to right. ValueError if they are not the scene.
    """
    order = assign(scene, found)
    if order is None:
        raise ValueError(f"the objects found are not {scene.prompt!r}: only right images have free attributes")
    values = list(background.tolist())
    for group in scene.groups:
        members, order = sorted(order[: group.count], key=lambda one: one.x), order[group.count :]
        for one in members:
            values += [one.x / SIZE, one.y / SIZE]
            values += [] if group.size else [one.radius / (LARGE[-1] - SMALL[0])]
    return torch.tensor(values)


def _spread(rows: list[Tensor]) -> float:
    """Mean distance of two of the n >= 2 rows (k,), per square root of k."""
    return torch.pdist(torch.stack(rows)).mean().item() / len(rows[0]) ** 0.5


@lru_cache(maxsize=4096)
def _drawn_spread(prompt: str) -> float:
    """`_spread` of the world itself. It depends on the prompt alone, not on the other prompts of a set."""
    scene = parse(prompt)
    layout = lay_out([scene] * DRAWN, torch.Generator().manual_seed(zlib.crc32(prompt.encode())))
    rows = []
    for i in range(DRAWN):
        placed = zip(_objects(scene), layout.radius[i].tolist(), layout.centre[i].tolist(), strict=False)
        found = [Found(group.shape, group.colour, group.style, radius, *centre) for group, radius, centre in placed]
        rows.append(free_attributes(scene, found, layout.background[i]))
    return _spread(rows)


def free_diversity(images: Tensor, prompts: Sequence[str]) -> float | None:
    """How varied the right images (B, 3, 64, 64) of a prompt are, relative to drawn ones: 1 is as varied as the world.

    For each prompt with at least two right images: the mean pairwise Euclidean distance of their `free_attributes`,
    divided by sqrt(k), k being their number. The mean of this over those prompts, divided by the mean of the same
    quantity over the same prompts in seeded drawings (their true attributes). None if no prompt has two right images.
    """
    rows: dict[str, list[Tensor]] = {}
    for prompt, (_, attributes) in zip(prompts, assess(images, prompts), strict=True):
        if attributes is not None:
            rows.setdefault(prompt, []).append(attributes)
    spreads = [free_spread(prompt, values) for prompt, values in rows.items() if len(values) > 1]
    return sum(own for own, _ in spreads) / sum(drawn for _, drawn in spreads) if spreads else None


def free_spread(prompt: str, attributes: list[Tensor]) -> tuple[float, float]:
    """Of a prompt's right images, n >= 2 with their `free_attributes` (k,), and of as many drawn ones as it takes:
    numerator and denominator of `free_diversity`."""
    return _spread(attributes), _drawn_spread(prompt)


def degrade(images: Tensor, generator: torch.Generator, blur: float = 0.7, noise: float = 0.03) -> Tensor:
    """Gaussian blur (standard deviation in pixels), then Gaussian noise, as the verifier's promise has it."""
    blurred = torch.from_numpy(ndimage.gaussian_filter(images.numpy(), (0, 0, blur, blur)))
    return (blurred + noise * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def measure(count: int, seed: int = 0) -> tuple[float, float, float]:
    """Share of degraded scenes read right, share of one-word-wrong prompts accepted, milliseconds per image."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    scenes = [random_scene(rng) for _ in range(count)]
    images = torch.cat([draw_scenes(scenes[i : i + 100], generator) for i in range(0, count, 100)])
    images = degrade(images, generator)
    start = time.process_time()
    found = [objects for objects, _ in read_all(images)]
    milliseconds = 1000 * (time.process_time() - start) / count
    right = sum(map(matches, scenes, found)) / count
    wrong = sum(matches(one_word_wrong(scene, rng), objects) for scene, objects in zip(scenes, found, strict=True))
    return right, wrong / count, milliseconds


if __name__ == "__main__":
    right, wrong, milliseconds = measure(2000)
    print(f"2000 random scenes, blur of 0.7 pixels, then noise of 0.03: {right:.2%} right")
    print(f"the same images with one word of the prompt changed: {wrong:.2%} accepted")
    print(f"{milliseconds:.2f} ms per image")
