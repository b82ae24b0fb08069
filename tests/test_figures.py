"""Sheets hold the images they were given, at the places and in the frames that their labels say."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image

from sd3_adrpo import figures


def _plain(colours: list[tuple[int, int, int]], size: int = 8) -> torch.Tensor:
    return torch.tensor(colours, dtype=torch.uint8)[:, :, None, None].expand(-1, -1, size, size)


def _places(path, colour: tuple[int, int, int]) -> np.ndarray:
    """Pixels (n, 2) as (y, x) that have exactly this colour."""
    return np.argwhere((np.asarray(Image.open(path).convert("RGB")) == colour).all(-1))


def test_small_images_are_enlarged_by_whole_pixels(tmp_path):
    checker = torch.zeros(1, 3, 8, 8)
    checker[:, 0, ::2, ::2] = 1.0
    path = figures.grid(checker, 1, tmp_path / "grid.png")
    red = _places(path, (255, 0, 0))
    assert len(red) == 16 * 16 * 16  # 16 pixels of the checker, 16 x 16 on the sheet each, none blended


def test_grid_fills_rows_first(tmp_path):
    colours = [(10, 0, 0), (20, 0, 0), (30, 0, 0), (40, 0, 0), (50, 0, 0), (60, 0, 0)]
    path = figures.grid(_plain(colours), 3, tmp_path / "grid.png", ["one", "two"], ["a", "b", "c"])
    centres = [_places(path, colour).mean(0) for colour in colours]
    assert centres[0][0] == centres[1][0] == centres[2][0] < centres[3][0] == centres[5][0]
    assert centres[0][1] == centres[3][1] < centres[1][1] == centres[4][1] < centres[2][1]


def test_grid_refuses_a_broken_last_row(tmp_path):
    with pytest.raises(ValueError, match="5 images do not fill rows of 2"):
        figures.grid(torch.zeros(5, 3, 8, 8), 2, tmp_path / "grid.png")


def test_prompts_may_hold_anything(tmp_path):
    prompts = ["$\\frac{1}{0$ costs 5$ and \n a_b^c {", "a " * 800]
    path = figures.grid(torch.zeros(2, 3, 8, 8), 1, tmp_path / "grid.png", prompts)
    height = Image.open(path).height
    assert height < 2 * (figures.CELL[0] + 100)  # the long prompt is cut, not the page


def test_before_is_left_after_is_right_and_frames_say_what_is_right(tmp_path):
    before, after = _plain([(10, 0, 0), (20, 0, 0)])[None], _plain([(0, 0, 10), (0, 0, 20)])[None]
    path = figures.before_after(tmp_path / "sheet.png", before, after, ["a prompt"], [[False, None]], [[True, True]])
    columns = [_places(path, colour)[:, 1] for colour in ((10, 0, 0), (20, 0, 0), (0, 0, 10), (0, 0, 20))]
    for left, right in zip(columns[:-1], columns[1:], strict=True):
        assert left.max() < right.min()
    red, green = _places(path, figures.WRONG)[:, 1], _places(path, figures.RIGHT)[:, 1]
    frame = figures.FRAME
    assert (red.min(), red.max()) == (columns[0].min() - frame, columns[0].max() + frame)
    assert (green.min(), green.max()) == (columns[2].min() - frame, columns[3].max() + frame)
    side = figures.CELL[0]
    assert len(red) == (side + 2 * frame) ** 2 - side**2
    assert len(green) == 2 * len(red)


def test_large_images_are_reduced(tmp_path):
    path = figures.grid(torch.zeros(1, 3, 512, 512), 1, tmp_path / "grid.png")
    assert Image.open(path).width < figures.CELL[1] + 50


def test_curves_of_a_log_with_a_repeated_epoch_and_a_cut_line(tmp_path, monkeypatch):
    log = tmp_path / "metrics.jsonl"
    lines = [{"epoch": 0, "reward": 1.0}, {"epoch": 1, "reward": 9.0}, {"epoch": 1, "reward": 3.0, "train/w2": 0.5}]
    lines += [{"kind": "update", "epoch": 0, "reward": 50.0}]
    log.write_text("\n".join(json.dumps(line) for line in lines) + '\n{"epoch": 1, "rew')
    drawn = []
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda axis, x, y, **style: drawn.append((x, y)) or plot(axis, x, y, **style))
    picture = Image.open(figures.curves(log, tmp_path / "curves.png"))
    assert drawn == [((0, 1), (1.0, 3.0)), ((1,), (0.5,))]  # reward, drift; what a resumed run repeated counts once
    assert picture.width > 2 * picture.height  # two panels
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_log_without_anything_to_draw(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"seconds": 3}\n')
    assert figures.curves(log, tmp_path / "curves.png") is None
    assert not (tmp_path / "curves.png").exists()
