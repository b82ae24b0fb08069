"""The rewards that need no model: jpeg, shapes and any Python function; and what every file of rewards/ keeps to."""

from __future__ import annotations

import dataclasses
import io
import sys

import pytest
import torch
from PIL import Image

from sd3_adrpo import choices, cli
from sd3_adrpo.errors import RewardError, UserError
from sd3_adrpo.prompts import Prompt
from sd3_adrpo.rewards.jpeg import JpegReward
from sd3_adrpo.rewards.python import PythonReward
from sd3_adrpo.rewards.shapes import ShapesReward
from sd3_adrpo.shapes.drawing import draw_scenes
from sd3_adrpo.shapes.grammar import parse

IMAGES = torch.rand(3, 3, 24, 40, generator=torch.Generator().manual_seed(0))
PROMPTS = [Prompt("a", metadata={"text": "A"}), Prompt("b b"), Prompt("c c c")]


@pytest.mark.parametrize("name", cli.available("reward"))
def test_every_file_is_a_reward(name):
    cls = choices.dataclass_of("reward", name)
    fields = dataclasses.fields(cls)
    assert fields[0].name == "name" and fields[0].default == name
    assert all(field.default is not dataclasses.MISSING for field in fields)
    assert (
        callable(cls.load) and callable(cls.describe) and cls.__doc__ and not cls.__doc__.startswith(cls.__name__ + "(")
    )


def test_jpeg_is_minus_the_file_in_kilobytes_or_the_distance_to_a_size():
    buffer = io.BytesIO()
    pixels = (IMAGES[1] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    size = len(buffer.getvalue()) / 1000
    scores = JpegReward().load()(IMAGES, PROMPTS)
    assert scores.shape == (3,) and scores.dtype == torch.float32 and scores[1].item() == pytest.approx(-size)
    assert JpegReward(target=0.5).load()(IMAGES, PROMPTS)[1].item() == pytest.approx(-abs(size - 0.5))
    flat = torch.full((1, 3, 24, 40), 0.5)
    assert JpegReward().load()(flat, PROMPTS[:1]) > scores.max()
    assert JpegReward(target=3.0).load().unit == "-|kB - 3|"
    for options in ({"quality": 0}, {"target": 0.0}):
        with pytest.raises(UserError, match="it must be"):
            JpegReward(**options).describe()


def test_shapes_is_1_for_the_right_image():
    texts = ["a red circle", "two blue squares", "a green heart above a pink cross"]
    images = draw_scenes([parse(text) for text in texts], torch.Generator().manual_seed(0))
    scorer = ShapesReward().load()
    assert scorer(images, [Prompt(text) for text in texts]).tolist() == [1.0, 1.0, 1.0]
    assert scorer((images * 255).round().to(torch.uint8), [Prompt(text) for text in texts]).tolist() == [1.0] * 3
    wrong = [Prompt("a red square"), Prompt(texts[1]), Prompt("a green heart below a pink cross")]
    assert scorer(images, wrong).tolist() == [0.0, 1.0, 0.0]


def test_shapes_refuses_what_it_cannot_judge():
    ShapesReward().check_prompts([Prompt("a red circle")])
    with pytest.raises(UserError, match="'a cat'.*two red circles"):
        ShapesReward().check_prompts([Prompt("a red circle"), Prompt("a cat")])
    with pytest.raises(UserError, match="judge 'a cat': it knows"):  # of train and test prompts: said once
        ShapesReward().check_prompts([Prompt("a cat"), Prompt("a cat")])
    scorer = ShapesReward().load()
    with pytest.raises(RewardError, match="40 x 24; it reads 64 x 64"):
        scorer(IMAGES, PROMPTS)
    with pytest.raises(RewardError, match="no answer for 'b b'"):
        scorer(torch.zeros(1, 3, 64, 64), PROMPTS[1:2])


@pytest.fixture
def file(tmp_path):
    (tmp_path / "beside.py").write_text("FACTOR = 2\n")
    path = tmp_path / "clip.py"  # a name that hides no library
    path.write_text(
        "import numpy, torch\n"
        "def words(images, prompts):\n"
        "    from beside import FACTOR\n"
        "    return [FACTOR * len(prompt.split()) for prompt in prompts]\n"
        "def pixels(images, prompts):\n"
        "    assert images.dtype == torch.uint8\n"
        "    return images.double().mean((1, 2, 3)).numpy()\n"
        "pixels.unit = 'grey value'\n"
        "def records(images, prompts, metadata):\n"
        "    return torch.tensor([float(record is not None) for record in metadata], requires_grad=True)\n"
    )
    return path


def test_python_takes_lists_arrays_and_tensors(file):
    words = PythonReward(function=f"{file}:words").load()
    assert words(IMAGES, PROMPTS).tolist() == [2.0, 4.0, 6.0] and words(IMAGES, PROMPTS).dtype == torch.float32
    pixels = PythonReward(function=f"{file}:pixels").load()
    expected = (IMAGES * 255).round().mean((1, 2, 3))
    assert torch.allclose(pixels(IMAGES, PROMPTS), expected) and pixels.unit == "grey value"
    records = PythonReward(function=f"{file}:records").load()(IMAGES, PROMPTS)
    assert records.tolist() == [1.0, 0.0, 0.0] and not records.requires_grad


def test_python_finds_modules_of_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "my_module_reward.py").write_text("def score(images, prompts):\n    return [1.5] * len(prompts)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert PythonReward(function="my_module_reward:score").load()(IMAGES, PROMPTS).tolist() == [1.5] * 3


def test_python_says_what_is_wrong(file, tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("from nothing_of_that_name import score\n")
    for function, message in [
        (None, "it must be module:function"),
        ("my_reward.py", "it must be module:function"),
        (f"{tmp_path}/nowhere.py:score", "is not there"),
        (f"{file}:score", "has no function 'score'; it has words, pixels, records"),
        (f"{bad}:score", "does not load: ModuleNotFoundError"),
    ]:
        with pytest.raises(UserError, match=message):
            PythonReward(function=function).load()
    with pytest.raises(UserError, match="has no function 'score'; it has words, pixels, records"):
        PythonReward(function=f"{file}:score").describe()  # a dry run says so too
