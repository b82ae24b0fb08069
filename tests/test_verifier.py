"""The verifier reads drawings, blurred and noisy ones too, and accepts nothing that was not asked for."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from sd3_adrpo.shapes.drawing import Layout, draw, draw_scenes, lay_out
from sd3_adrpo.shapes.grammar import (
    COLOURS,
    MAX_OBJECTS,
    SHAPES,
    STYLES,
    Group,
    Scene,
    one_word_wrong,
    parse,
    random_scene,
)
from sd3_adrpo.shapes.verifier import (
    Found,
    degrade,
    free_attributes,
    free_diversity,
    matches,
    measure,
    read,
    read_all,
    verify,
)


@pytest.fixture(scope="module")
def drawn() -> tuple[list[Scene], Layout, torch.Tensor]:
    """60 scenes, their layout and their images."""
    rng, generator = random.Random(5), torch.Generator().manual_seed(5)
    scenes = [random_scene(rng) for _ in range(60)]
    layout = lay_out(scenes, generator)
    return scenes, layout, draw(layout, generator)


def scene_of(prompt: str) -> Scene:
    scene = parse(prompt)
    assert scene is not None
    return scene


def circle(x: float, y: float, colour: str = "red", radius: float = 7.0) -> Found:
    return Found("circle", colour, "solid", radius, x, y)


def test_degraded_scenes_are_read_right_and_wrong_prompts_refused():
    """The promise (99 %, 1 %) is measured on 2,000 scenes by `python -m sd3_adrpo.shapes.verifier`."""
    right, wrong, _ = measure(400, seed=11)
    assert right >= 0.99
    assert wrong <= 0.01


def test_reads_back_position_radius_and_background(drawn):
    scenes, layout, images = drawn
    for i, (found, background) in enumerate(read_all(images)):
        n = scenes[i].count
        assert len(found) == n
        assert torch.allclose(background, layout.background[i], atol=0.01)
        truth = torch.cat([layout.centre[i, :n], layout.radius[i, :n, None]], 1)
        for one in found:
            error = (truth - torch.tensor([one.x, one.y, one.radius])).abs().amax(1)
            nearest = int(error.argmin())
            assert error[nearest] < 0.5  # pixels
            kind = [table[row[i, nearest]] for table, row in zip(
                (SHAPES, COLOURS, STYLES), (layout.shape, layout.colour, layout.style), strict=True)]  # fmt: skip
            assert [one.shape, one.colour, one.style] == kind


def test_touching_objects_are_two():
    """Two hearts whose tips meet, as the drawing's gap between circles around them allows."""
    layout = Layout(
        shape=torch.full((1, MAX_OBJECTS), SHAPES.index("heart")),
        colour=torch.full((1, MAX_OBJECTS), COLOURS.index("blue")),
        style=torch.zeros(1, MAX_OBJECTS, dtype=torch.long),
        present=torch.tensor([[True, True, False, False]]),
        radius=torch.full((1, MAX_OBJECTS), 11.0),
        centre=torch.tensor([[[18.0, 16.0], [36.0, 34.0], [0, 0], [0, 0]]]),
        background=torch.full((1, 3), 0.5),
        relation=[None],
    )
    image = degrade(draw(layout), torch.Generator().manual_seed(0))
    assert verify(image, ["two blue hearts"]) == [True]
    assert verify(image, ["a blue heart"]) == [False]


def test_an_empty_image_holds_nothing():
    found, background = read(torch.full((3, 64, 64), 0.3))
    assert found == [] and torch.allclose(background, torch.full((3,), 0.3))


def test_specks_and_grey_blotches_are_no_objects():
    image = torch.full((3, 64, 64), 0.3)
    image[:, 5:20, 5:20] = 0.6  # no colour
    image[0, 40:42, 40:42] = 1.0  # four pixels
    assert read(image)[0] == []


def test_a_coloured_smear_has_no_shape():
    image = torch.full((3, 64, 64), 0.3)
    image[:, 30:33, 4:60] = torch.tensor([0.9, 0.1, 0.1])[:, None, None]
    found, _ = read(image)
    assert [one.shape for one in found] == ["unclear"]
    assert not any(matches(Scene((Group(shape, "red"),)), found) for shape in SHAPES)


def test_broken_pixels_do_not_break_it():
    image = draw_scenes([scene_of("a blue circle")], torch.Generator().manual_seed(1))
    image[0, :, 0, 0] = float("nan")
    image[0, :, 0, 1] = 7.0
    assert verify(image, ["a blue circle"]) == [True]


def test_matches_needs_every_word_and_nothing_else():
    scene = scene_of("two red circles and a blue circle")
    right = [circle(10, 10), circle(50, 50, "blue"), circle(30, 30)]
    assert matches(scene, right) and matches(scene, right[::-1])
    assert not matches(scene, right[:2])
    assert not matches(scene, [*right, circle(10, 50)])
    for change in ({"shape": "heart"}, {"colour": "green"}, {"style": "striped"}):
        assert not matches(scene, [replace(right[0], **change), *right[1:]])


@pytest.mark.parametrize(("radius", "small"), [(6.0, True), (8.9, True), (9.0, False), (12.5, False)])
def test_named_sizes_part_at_the_boundary(radius, small):
    found = [circle(30, 30, radius=radius)]
    assert matches(scene_of("a small red circle"), found) is small
    assert matches(scene_of("a large red circle"), found) is not small
    assert matches(scene_of("a red circle"), found)


def test_like_objects_of_two_sizes_are_assigned():
    """The grammar never asks for this; the assignment still has to find the one order that fits."""
    scene = Scene((Group("circle", "red", size="small"), Group("circle", "red", size="large")))
    assert matches(scene, [circle(10, 10, radius=11), circle(40, 40, radius=7)])
    assert not matches(scene, [circle(10, 10, radius=11), circle(40, 40, radius=12)])


@pytest.mark.parametrize(
    ("x", "y", "relation"),
    [(10, 33, "left of"), (50, 31, "right of"), (31, 10, "above"), (33, 50, "below"), (20, 20, None), (30, 30, None)],
)
def test_relation_of_the_first_to_the_second(x, y, relation):
    """The red circle stands at (x, y), the blue one at (30, 30). A tie between two directions is neither."""
    found = [circle(30, 30, "blue"), circle(x, y)]
    for name in ("left of", "right of", "above", "below"):
        assert matches(scene_of(f"a red circle {name} a blue circle"), found) is (name == relation)
    assert matches(scene_of("a red circle and a blue circle"), found)


def test_no_answer_outside_the_world(drawn):
    scenes, _, images = drawn
    prompts = [
        scenes[0].prompt,
        "a photo of a cat",
        scenes[2].prompt,
        one_word_wrong(scenes[3], random.Random(0)).prompt,
    ]
    assert verify(images[:4], prompts) == [True, None, True, False]
    assert verify(torch.rand(2, 3, 32, 32), prompts[:2]) == [None, None]
    with pytest.raises(ValueError, match="4 images and 1 prompts"):
        verify(images[:4], prompts[:1])


def test_free_attributes_in_canonical_order():
    background = torch.tensor([0.1, 0.2, 0.3])
    scene = scene_of("two red circles and a blue circle")
    found = [circle(48, 16, radius=5), circle(32, 64, "blue", radius=10), circle(16, 32, radius=5)]
    expected = torch.tensor([0.1, 0.2, 0.3, 0.25, 0.5, 1, 0.75, 0.25, 1, 0.5, 1, 2])
    assert torch.allclose(free_attributes(scene, found, background), expected)
    named = free_attributes(scene_of("a small red circle"), [circle(16, 32)], background)
    assert torch.allclose(named, torch.tensor([0.1, 0.2, 0.3, 0.25, 0.5]))  # the size is not free
    with pytest.raises(ValueError, match="only right images"):
        free_attributes(scene, found[:2], background)


def test_free_diversity_of_drawn_and_of_equal_images():
    prompts = ["a red circle", "a small green cross left of a pink heart", "two blue squares"]
    asked = [prompt for prompt in prompts for _ in range(24)]
    images = draw_scenes([scene_of(prompt) for prompt in asked], torch.Generator().manual_seed(4))
    assert free_diversity(images, asked) == pytest.approx(1, abs=0.1)  # drawn images are the unit
    equal = images[::24].repeat_interleave(24, 0)
    assert free_diversity(equal, asked) == pytest.approx(0, abs=1e-5)
    half = torch.cat([images[:24], equal[24:48]])
    assert 0.3 < free_diversity(half, asked[:48]) < 0.7  # one of two prompts has collapsed


def test_free_diversity_counts_right_images_only():
    prompt = "a red circle"
    images = draw_scenes([scene_of(prompt)] * 8, torch.Generator().manual_seed(6))
    wrong = draw_scenes([scene_of("a blue cross")] * 8, torch.Generator().manual_seed(7))
    both = free_diversity(torch.cat([images, wrong]), [prompt] * 16)
    assert both == pytest.approx(free_diversity(images, [prompt] * 8))
    assert free_diversity(wrong, [prompt] * 8) is None
    assert free_diversity(images[:1], [prompt]) is None
    assert free_diversity(images, ["a photo of a cat"] * 8) is None
