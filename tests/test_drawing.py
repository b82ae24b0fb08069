"""The built-in world: sentences mean what they say, and drawings obey them."""

from __future__ import annotations

import random

import pytest
import torch

from sd3_adrpo.shapes.drawing import (
    EXTENT,
    FREE,
    LARGE,
    LATTICE,
    PALETTE,
    SIZE,
    SMALL,
    STRIPE_SHADE,
    STYLED,
    Layout,
    draw,
    lay_out,
    signed_distance,
)
from sd3_adrpo.shapes.grammar import (
    CATEGORIES,
    COLOURS,
    CONVERSE,
    MAX_OBJECTS,
    SHAPES,
    STYLES,
    UNSEEN,
    Group,
    Scene,
    one_word_wrong,
    parse,
    random_scene,
)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = random.Random(0)
    return [random_scene(rng) for _ in range(400)]


@pytest.fixture(scope="module")
def layout(scenes: list[Scene]) -> Layout:
    return lay_out(scenes, torch.Generator().manual_seed(0))


def one(shape: str, style: str, radius: float, background: float) -> Layout:
    """A red object in the middle of pixel (32, 32)."""
    kind = torch.tensor([[SHAPES.index(shape), COLOURS.index("red"), STYLES.index(style)] + [0]])
    return Layout(
        *(kind[:, i : i + 1].expand(1, MAX_OBJECTS) for i in range(3)),
        present=torch.tensor([[True, False, False, False]]),
        radius=torch.full((1, MAX_OBJECTS), radius),
        centre=torch.full((1, MAX_OBJECTS, 2), 32.5),
        background=torch.full((1, 3), background),
        relation=[None],
    )


def test_every_prompt_is_read_back(scenes):
    for scene in scenes:
        assert parse(scene.prompt) == scene
        assert parse(scene.prompt.capitalize() + ".") == scene


def test_sentences_as_written_in_english():
    heart = Group("heart", "orange", style="outlined", size="large")
    assert Scene((heart,)).prompt == "a large outlined orange heart"
    assert (
        Scene((Group("cross", "orange"), Group("circle", "red", 3))).prompt == "an orange cross and three red circles"
    )
    assert Scene((Group("square", "green", style="striped"), Group("diamond", "pink")), "left of").prompt == (
        "a striped green square left of a pink diamond"
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a photo of a cat",
        "a red",
        "a red circles",
        "two red circle",
        "an red circle",
        "five red circles",
        "a solid red circle",
        "a red circle and a red circle",
        "a small striped red circle",
        "two red circles above a blue square",
        "three red circles and two blue squares",
        "a red circle and a blue square and a green heart",
    ],
)
def test_other_texts_are_outside_the_grammar(text):
    assert parse(text) is None


def test_converse_relations_have_the_same_key(scenes):
    related = [scene for scene in scenes if scene.relation]
    assert len(related) > 50
    for scene in related:
        converse = Scene(scene.groups[::-1], CONVERSE[scene.relation])
        assert converse.key == scene.key and converse.prompt != scene.prompt and converse.split == scene.split
        assert Scene(scene.groups[::-1], scene.relation).key != scene.key


def test_order_of_and_does_not_change_the_key(scenes):
    pairs = [scene for scene in scenes if len(scene.groups) == 2 and not scene.relation]
    assert len(pairs) > 50
    assert all(Scene(scene.groups[::-1]).key == scene.key for scene in pairs)


def test_splits_are_disjoint_and_hold_back_the_unseen_pairs():
    rng = random.Random(1)
    drawn = [random_scene(rng) for _ in range(3000)]
    keys = {name: {scene.key for scene in drawn if scene.split == name} for name in ("pretrain", "rl", "test")}
    assert not keys["pretrain"] & keys["rl"] and not keys["pretrain"] & keys["test"] and not keys["rl"] & keys["test"]
    assert len(keys["pretrain"]) > len(keys["rl"]) + len(keys["test"]) and min(map(len, keys.values())) > 100
    for scene in drawn:
        pairs = {(group.colour, group.shape) for group in scene.groups}
        assert not (scene.split == "pretrain" and pairs & (UNSEEN["rl"] | UNSEEN["test"]))
        assert not (scene.split == "rl" and pairs & UNSEEN["test"])
        assert not (scene.split == "test" and pairs & UNSEEN["rl"])
    assert {scene.category for scene in drawn} == set(CATEGORIES)


def test_one_word_wrong_asks_for_another_picture(scenes):
    rng = random.Random(2)
    for scene in scenes:
        wrong = one_word_wrong(scene, rng)
        assert wrong.key != scene.key and parse(wrong.prompt) == wrong
        changed = [a != b for a, b in zip(scene.groups, wrong.groups, strict=True)] + [scene.relation != wrong.relation]
        assert sum(changed) == 1


def test_centres_obey_relation_gap_and_margin(scenes, layout):
    for i, scene in enumerate(scenes):
        n = scene.count
        assert layout.present[i].sum() == n
        centre, radius = layout.centre[i, :n], layout.radius[i, :n]
        reach = (EXTENT * radius + 0.5)[:, None]
        assert torch.equal(centre % LATTICE, torch.zeros_like(centre))
        assert (centre >= reach - 1e-4).all() and (centre <= SIZE - reach + 1e-4).all()
        for a in range(n):
            for b in range(a):
                gap = (centre[a] - centre[b]).norm() - EXTENT * (radius[a] + radius[b])
                assert gap >= 2 - 1e-4
        if scene.relation:
            x, y = (centre[0] - centre[1]).tolist()
            along, across = {"left of": (-x, y), "right of": (x, y), "above": (-y, x), "below": (y, x)}[scene.relation]
            assert along >= abs(across) + 4 - 1e-4


def test_radii_are_what_the_words_say(scenes, layout):
    for i, scene in enumerate(scenes):
        objects = [group for group in scene.groups for _ in range(group.count)]
        for group, radius in zip(objects, layout.radius[i].tolist(), strict=False):
            free = FREE[scene.count] if group.style == "solid" else STYLED
            assert radius in {"small": SMALL, "large": LARGE, None: free}[group.size]


def test_area_of_each_shape():
    """Covered pixels of a radius-10 object against the area of its silhouette on a grid sixteen times finer."""
    line = (torch.arange(512) + 0.5) / 512 * 3 - 1.5
    y, x = torch.meshgrid(line, line, indexing="ij")
    for index, shape in enumerate(SHAPES):
        area = (signed_distance(index, x, y) < 0).float().sum() * (3 / 512) ** 2
        image = draw(one(shape, "solid", 10.0, background=0.0))
        assert image[0, 0].sum() / PALETTE[0, 0] == pytest.approx(100 * area.item(), rel=0.02)
    assert (signed_distance(0, x, y) < 0).float().mean() * 9 == pytest.approx(torch.pi, rel=1e-2)  # the circle


def test_styles_and_stripes_at_known_pixels():
    red, grey = PALETTE[0], torch.full((3,), 0.5)
    solid, outlined, striped = (draw(one("circle", style, 10.0, background=0.5))[0] for style in STYLES)
    assert torch.allclose(solid[:, 32, 32], red) and torch.allclose(solid[:, 0, 0], grey)
    assert torch.allclose(outlined[:, 32, 32], grey) and torch.allclose(outlined[:, 32, 41], red, atol=0.01)
    assert torch.allclose(striped[:, 32, 32], STRIPE_SHADE * red) and torch.allclose(striped[:, 35, 32], red)


def test_same_seed_same_image(scenes):
    def images(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return draw(lay_out(scenes[:4], generator), generator)

    assert torch.equal(images(3), images(3)) and not torch.equal(images(3), images(4))
