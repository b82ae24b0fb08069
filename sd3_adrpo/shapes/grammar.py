"""The sentences of the built-in world: what a prompt can ask for, and what it means.

A `Scene` is one or two `Group`s of like objects, at most four objects together, and possibly a spatial relation:

    "three red circles"   "a small blue heart and an orange cross"   "a striped green square left of a pink diamond"

`Scene.prompt` writes a scene as English, `parse` reads it back, `Scene.key` is the same for two prompts that ask for
the same picture ("A left of B" and "B right of A"), and `split` deals every combination to one of the three sets.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass, replace

SHAPES = ("circle", "square", "triangle", "diamond", "heart", "cross")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
STYLES = ("solid", "outlined", "striped")  # solid is the default and is never written
SIZES = (None, "small", "large")  # None: the prompt leaves the size free
RELATIONS = ("left of", "right of", "above", "below")
CONVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
COUNTS = ("a", "two", "three", "four")
MAX_OBJECTS = 4
CATEGORIES = ("colours", "counting", "positional", "descriptions", "unseen")

# Colour-shape pairs that pretraining never shows: the first are for reinforcement learning, the second for the test.
UNSEEN = {
    "rl": {("red", "heart"), ("green", "diamond"), ("purple", "circle"), ("yellow", "cross")},
    "test": {("blue", "triangle"), ("orange", "square"), ("pink", "cross"), ("cyan", "heart")},
}


def plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


@dataclass(frozen=True)
class Group:
    """`count` objects that look alike."""

    shape: str
    colour: str
    count: int = 1
    style: str = "solid"
    size: str | None = None

    @property
    def phrase(self) -> str:
        adjectives = [self.size, self.style if self.style != "solid" else None, self.colour]
        words = [word for word in adjectives if word] + [self.shape if self.count == 1 else plural(self.shape)]
        article = ("an" if words[0][0] in "aeiou" else "a") if self.count == 1 else COUNTS[self.count - 1]
        return " ".join([article, *words])


@dataclass(frozen=True)
class Scene:
    """One or two groups; `relation` says where the first stands as seen from the second (both then have count 1)."""

    groups: tuple[Group, ...]
    relation: str | None = None

    @property
    def prompt(self) -> str:
        return f" {self.relation or 'and'} ".join(group.phrase for group in self.groups)

    @property
    def count(self) -> int:
        return sum(group.count for group in self.groups)

    @property
    def key(self) -> str:
        """Equal for prompts that ask for the same picture."""
        if self.relation in ("right of", "below"):
            return Scene(self.groups[::-1], CONVERSE[self.relation]).prompt
        if self.relation is None:
            return Scene(tuple(sorted(self.groups, key=lambda group: group.phrase))).prompt
        return self.prompt

    @property
    def valid(self) -> bool:
        """Whether the scene is a sentence of the world: see the conditions, each with its reason."""
        groups = self.groups
        adjectives = any(group.size or group.style != "solid" for group in groups)
        return (
            self.count <= MAX_OBJECTS
            and not (adjectives and self.count > 2)  # many objects are small: no room for sizes and styles
            and not any(group.size == "small" and group.style != "solid" for group in groups)  # too fine for 64 pixels
            and not (self.relation and any(group.count > 1 for group in groups))
            and not (len(groups) == 2 and _kind(groups[0]) == _kind(groups[1]))  # "a red circle and a red circle"
        )

    @property
    def category(self) -> str:
        """One of `CATEGORIES`, after DrawBench's idea (Imagen, arXiv 2205.11487, appendix C)."""
        if any((group.colour, group.shape) in pairs for pairs in UNSEEN.values() for group in self.groups):
            return "unseen"
        if self.relation:
            return "positional"
        if any(group.count > 1 for group in self.groups):
            return "counting"
        if any(group.size or group.style != "solid" for group in self.groups):
            return "descriptions"
        return "colours"

    @property
    def split(self) -> str | None:
        """`pretrain`, `rl` or `test`; None for the few scenes that mix the unseen pairs of both and belong to none."""
        unseen = {
            name for name, pairs in UNSEEN.items() for group in self.groups if (group.colour, group.shape) in pairs
        }
        if unseen:
            return unseen.pop() if len(unseen) == 1 else None
        bucket = zlib.crc32(self.key.encode()) % 10
        return {0: "rl", 1: "test"}.get(bucket, "pretrain")


def _kind(group: Group) -> tuple:
    return group.shape, group.colour, group.style


def parse(prompt: str) -> Scene | None:
    """The scene that a prompt of the world asks for; None for any other text."""
    text = " ".join(prompt.lower().strip().rstrip(".").split())
    relation = next((name for name in RELATIONS if f" {name} " in text), None)
    joiner = f" {relation or 'and'} "
    groups = [_parse_group(phrase) for phrase in text.split(joiner)]
    if not 1 <= len(groups) <= 2 or None in groups:
        return None
    scene = Scene(tuple(groups), relation)
    return scene if scene.valid and scene.prompt == text else None


def _parse_group(phrase: str) -> Group | None:
    words = phrase.split()
    counts = {**{word: n for n, word in enumerate(COUNTS, 1)}, "an": 1}
    nouns = {form: shape for shape in SHAPES for form in (shape, plural(shape))}
    if len(words) < 3 or words[0] not in counts or words[-1] not in nouns:
        return None
    size, style, adjectives = None, "solid", words[1:-1]
    if adjectives and adjectives[0] in SIZES:
        size = adjectives.pop(0)
    if adjectives and adjectives[0] in STYLES:
        style = adjectives.pop(0)
    if len(adjectives) != 1 or adjectives[0] not in COLOURS:
        return None
    return Group(nouns[words[-1]], adjectives[0], counts[words[0]], style, size)


def random_scene(rng: random.Random) -> Scene:
    """A scene of the world: kinds of sentence in fixed shares, everything within a kind uniform."""
    while True:
        kind = rng.choices(("one", "many", "pair", "many pair", "relation"), weights=(20, 15, 15, 20, 30))[0]
        counts = {"one": [1], "many": [rng.randint(2, 4)], "pair": [1, 1], "relation": [1, 1]}.get(kind)
        counts = counts or rng.choice([[1, 2], [2, 1], [1, 3], [3, 1], [2, 2]])
        plain = kind in ("many", "many pair")
        groups = tuple(_random_group(rng, count, 0.0 if plain else 0.3) for count in counts)
        scene = Scene(groups, rng.choice(RELATIONS) if kind == "relation" else None)
        if scene.valid:
            return scene


def _random_group(rng: random.Random, count: int, adjective: float) -> Group:
    style = rng.choice(STYLES[1:]) if rng.random() < adjective else STYLES[0]
    size = rng.choice(SIZES[1:]) if rng.random() < adjective else None
    return Group(rng.choice(SHAPES), rng.choice(COLOURS), count, style, size)


def one_word_wrong(scene: Scene, rng: random.Random) -> Scene:
    """The same sentence with one word replaced: a shape, colour, count, style, size or the relation."""
    words = [(index, name) for index in range(len(scene.groups)) for name in ("shape", "colour", "count", "adjective")]
    words += [(None, "relation")] * (2 if scene.relation else 0)
    while True:
        index, name = rng.choice(words)
        if index is None:
            changed = replace(scene, relation=rng.choice(RELATIONS))
        else:
            group = _change(scene.groups[index], name, rng)
            changed = replace(scene, groups=scene.groups[:index] + (group,) + scene.groups[index + 1 :])
        if changed.valid and changed.key != scene.key:
            return changed


def _change(group: Group, name: str, rng: random.Random) -> Group:
    if name == "shape":
        return replace(group, shape=rng.choice(SHAPES))
    if name == "colour":
        return replace(group, colour=rng.choice(COLOURS))
    if name == "count":
        return replace(group, count=rng.randint(1, MAX_OBJECTS))
    if group.size and rng.random() < 0.5:
        return replace(group, size="small" if group.size == "large" else "large")
    return replace(group, style=rng.choice(STYLES))
