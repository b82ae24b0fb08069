"""The built-in world's prompt files: what the generator makes, disjoint, balanced, and readable."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import pytest

from sd3_adrpo.prompts import PROMPTS_DIR, read_prompts
from sd3_adrpo.shapes.grammar import CATEGORIES, UNSEEN, Group, Scene, parse
from sd3_adrpo.shapes.prompt_sets import balanced, write

SIZES = {"shapes_pretrain": 6000, "shapes_rl": 512, "shapes_validation": 80, "shapes_test": 80}
SPLITS = {"shapes_pretrain": "pretrain", "shapes_rl": "rl", "shapes_validation": "rl", "shapes_test": "test"}


@pytest.fixture(scope="module")
def scenes() -> dict[str, list[Scene]]:
    """The shipped files, each prompt parsed back."""
    return {name: [parse(prompt.text) for prompt in read_prompts(PROMPTS_DIR / f"{name}.csv")] for name in SIZES}


def test_files_are_what_the_generator_makes(tmp_path):
    write(tmp_path)
    for name in SIZES:
        assert (tmp_path / f"{name}.csv").read_bytes() == (PROMPTS_DIR / f"{name}.csv").read_bytes()


def test_another_seed_makes_others(tmp_path, monkeypatch):
    monkeypatch.setattr("sd3_adrpo.shapes.prompt_sets.DRAWN", 10_000)
    write(tmp_path)
    first = (tmp_path / "shapes_test.csv").read_bytes()
    write(tmp_path, seed=1)
    assert (tmp_path / "shapes_test.csv").read_bytes() != first


@pytest.mark.parametrize("name", SIZES)
def test_each_set(name: str, scenes):
    prompts = read_prompts(PROMPTS_DIR / f"{name}.csv")
    assert len(prompts) == SIZES[name]
    assert None not in scenes[name]
    assert [prompt.category for prompt in prompts] == [scene.category for scene in scenes[name]]
    assert {scene.split for scene in scenes[name]} == {SPLITS[name]}
    assert len({scene.key for scene in scenes[name]}) == SIZES[name]


def test_sets_are_disjoint(scenes):
    keys = {name: {scene.key for scene in found} for name, found in scenes.items()}
    for one, other in combinations(keys, 2):
        assert not keys[one] & keys[other]


def test_pretraining_never_shows_unseen_pairs(scenes):
    pairs = {(group.colour, group.shape) for scene in scenes["shapes_pretrain"] for group in scene.groups}
    assert not pairs & (UNSEEN["rl"] | UNSEEN["test"])
    tested = {(group.colour, group.shape) for scene in scenes["shapes_test"] for group in scene.groups}
    assert tested >= UNSEEN["test"] and not tested & UNSEEN["rl"]


def test_balance(scenes):
    counts = {name: Counter(scene.category for scene in found) for name, found in scenes.items()}
    assert counts["shapes_test"] == counts["shapes_validation"] == {category: 16 for category in CATEGORIES}
    rl = counts["shapes_rl"]
    assert rl.pop("colours") >= 50  # all that the world has left
    assert set(rl) == set(CATEGORIES) - {"colours"} and max(rl.values()) - min(rl.values()) <= 1


def test_balanced_fills_up_from_categories_that_have_more():
    plain = [Scene((Group(shape, "red"),)) for shape in ("circle", "square")]
    many = [Scene((Group("circle", "red", count),)) for count in (2, 3, 4)] + [Scene((Group("square", "red", 2),))]
    assert balanced(many + plain, 5) == [plain[0], many[0], plain[1], many[1], many[2]]
    with pytest.raises(ValueError, match="7 scenes asked for, 6 there"):
        balanced(many + plain, 7)
