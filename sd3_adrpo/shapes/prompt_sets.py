"""The built-in world's four prompt files, disjoint by what they ask for: `python -m sd3_adrpo.shapes.prompt_sets`."""

from __future__ import annotations

import argparse
import csv
import random
from pathlib import Path

from ..prompts import PROMPTS_DIR
from .grammar import CATEGORIES, Scene, random_scene

DRAWN = 200_000  # random scenes, of which some 60,000 differ
PRETRAIN, RL, VALIDATION, TEST = 6000, 512, 80, 80


def prompt_sets(seed: int = 0) -> dict[str, list[Scene]]:
    """Scenes by the name of their file. No two, in any of the sets, ask for the same picture (`Scene.key`).

    Validation and test have as many of each category. So has the training set, except where the world runs out: of
    the scenes dealt to reinforcement learning only some 70 are of the category `colours`.
    """
    rng = random.Random(seed)
    unique: dict[str, Scene] = {}
    for _ in range(DRAWN):
        scene = random_scene(rng)
        unique.setdefault(scene.key, scene)
    scenes: dict[str | None, list[Scene]] = {"pretrain": [], "rl": [], "test": [], None: []}
    for scene in unique.values():
        scenes[scene.split].append(scene)
    validation = balanced(scenes["rl"], VALIDATION)
    taken = set(validation)
    rest = [scene for scene in scenes["rl"] if scene not in taken]
    return {
        "shapes_pretrain": scenes["pretrain"][:PRETRAIN],  # in the world's own shares
        "shapes_rl": balanced(rest, RL),
        "shapes_validation": validation,
        "shapes_test": balanced(scenes["test"], TEST),
    }


def balanced(scenes: list[Scene], count: int) -> list[Scene]:
    """`count` scenes, dealt one category after the other, in the given order within each, until they are enough."""
    if len(scenes) < count:
        raise ValueError(f"{count} scenes asked for, {len(scenes)} there: draw more")
    queues = [[scene for scene in scenes if scene.category == category] for category in CATEGORIES]
    depth = max(map(len, queues))
    dealt = [queue[turn] for turn in range(depth) for queue in queues if turn < len(queue)]
    return dealt[:count]


def write(folder: Path, seed: int = 0) -> None:
    """Four csv files with DrawBench's header."""
    for name, scenes in prompt_sets(seed).items():
        with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["Prompts", "Category"])
            writer.writerows([scene.prompt, scene.category] for scene in scenes)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=PROMPTS_DIR)
    write(parser.parse_args().output_dir)
