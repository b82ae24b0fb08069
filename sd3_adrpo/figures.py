"""Pictures of a run: sheets of images with their prompts, and curves."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from . import log

matplotlib.use("Agg")  # no window, also where there is a screen
from matplotlib import pyplot  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

CELL = (128, 256)  # pixels of an image on a sheet, smallest and largest side
GAP, BLOCK_GAP, FRAME, TEXT, TITLE = 4, 28, 4, 14, 18  # pixels
RIGHT, WRONG = (30, 160, 60), (215, 50, 45)
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
PANELS = {  # heading -> names that a log may use, in the order of preference
    "reward (100 x cosine)": ("reward",),
    "accuracy": ("accuracy",),
    "diversity (1 - cosine within a prompt)": ("clip_diversity",),
    "drift |v - v_ref|²": ("w2_drift", "w2"),
}


def grid(
    images: Tensor,
    columns: int,
    path: str | Path,
    row_labels: Sequence[str] | None = None,
    titles: Sequence[str] | None = None,
) -> Path:
    """PNG of images (R * columns, 3, H, W), [0, 1] or uint8, row by row; a label over each row, a title per column."""
    if columns < 1 or not len(images) or len(images) % columns:
        raise ValueError(f"{len(images)} images do not fill rows of {columns}")
    rows = images.unflatten(0, (-1, columns))
    heads = [(column, title) for column, title in enumerate(titles or [])]
    return _sheet([rows], [None], row_labels, heads, None, path)


def before_after(
    path: str | Path,
    before: Tensor,
    after: Tensor,
    prompts: Sequence[str],
    right_before: Sequence[Sequence[bool | None]] | None = None,
    right_after: Sequence[Sequence[bool | None]] | None = None,
    titles: tuple[str, str] = ("before: base model", "after: with LoRA, same noise"),
) -> Path:
    """PNG of two blocks (R, K, 3, H, W), a row per prompt, where images in the same place come from the same noise.

    `right_*` (R, K) colours frames green (the image shows what the prompt asks for), red (not); None: no frame.
    """
    if before.shape != after.shape or len(before) != len(prompts):
        raise ValueError(
            f"before {tuple(before.shape)}, after {tuple(after.shape)}, {len(prompts)} prompts do not match"
        )
    columns = before.shape[1]
    heads = [(0, titles[0]), (columns, titles[1])]
    flags = [right_before, right_after]
    known = any(flag is not None for block in flags for row in block or [] for flag in row)
    note = "green frame: the image shows what the prompt asks for; red frame: it does not" if known else None
    return _sheet([before, after], flags, prompts, heads, note, path)


def _sheet(blocks, flags, labels, heads, note, path) -> Path:
    """Blocks (R, K, 3, H, W) side by side, `heads` as (column, text) on top, labels over rows, a note at the end."""
    rows, columns = blocks[0].shape[:2]
    cells = [[[_cell(image) for image in row] for row in block] for block in blocks]
    width, height = cells[0][0][0].size
    step = width + 2 * FRAME + GAP
    left = [GAP + column * step + column // columns * BLOCK_GAP for column in range(columns * len(blocks))]
    total = left[-1] + step
    font, bold = _font("DejaVuSans.ttf", TEXT), _font("DejaVuSans-Bold.ttf", TITLE if len(blocks) > 1 else TEXT)
    room = step * columns if len(blocks) > 1 else step
    heading = [(left[column], _wrap(text, bold, room - GAP, 3)) for column, text in heads]
    captions = [_wrap(label, font, total - 2 * GAP, 3) for label in labels or []] or [[]] * rows
    lines = lambda texts: len(texts) * (TEXT + 5)  # noqa: E731
    top = GAP + max((len(text) * (TITLE + 5) for _, text in heading), default=0)
    tall = top + sum(lines(text) + height + 2 * FRAME + 2 * GAP for text in captions)
    footer = _wrap(note, font, total - 2 * GAP, 2) if note else []
    sheet = Image.new("RGB", (total, tall + lines(footer) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for x, text in heading:
        draw.multiline_text((x, GAP), "\n".join(text), "black", bold)
    y = top
    for row in range(rows):
        draw.multiline_text((GAP, y), "\n".join(captions[row]), "black", font)
        y += lines(captions[row])
        for number, x in enumerate(left):
            block, column = divmod(number, columns)
            flag = flags[block][row][column] if flags[block] is not None else None
            if flag is not None:
                draw.rectangle((x, y, x + width + 2 * FRAME - 1, y + height + 2 * FRAME - 1), RIGHT if flag else WRONG)
            sheet.paste(cells[block][row][column], (x + FRAME, y + FRAME))
        y += height + 2 * FRAME + 2 * GAP
    draw.multiline_text((GAP, y), "\n".join(footer), "black", font)
    return _save(sheet.save, path)


def _cell(image: Tensor) -> Image.Image:
    """A small image by a whole factor and nearest neighbour, so that its pixels stay visible; a large one reduced."""
    if image.is_floating_point():
        image = (image.nan_to_num() * 255).round().clamp(0, 255).to(torch.uint8)
    picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    longest = max(picture.size)
    if longest <= CELL[0]:
        factor = CELL[0] // longest
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    picture.thumbnail((CELL[1], CELL[1]), Image.Resampling.LANCZOS)
    return picture


def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(FONTS / name), size)  # matplotlib's own: on every machine, and beyond Latin


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
    """The text in at most `lines` lines of `width` pixels, the rest cut."""
    characters = max(8, int(width / font.getlength("n")))
    return textwrap.wrap(text, characters, max_lines=lines, placeholder=" …")


def _save(write, path: str | Path) -> Path:
    """Whole or not at all: whoever looks at a running job's folder sees no half picture."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    write(partial, format="png")
    return partial.replace(path)


def curves(metrics_jsonl: str | Path, path: str | Path) -> Path | None:
    """PNG of reward, accuracy, diversity and drift over epochs, as far as the log has them; None if it has none."""
    records = _numbers(log.read(metrics_jsonl, "epoch"))
    panels = []
    for heading, names in PANELS.items():
        name = next((name for name in names if any(name in record for _, record in records)), None)
        if name is not None:
            panels.append((heading, [(epoch, record[name]) for epoch, record in records if name in record]))
    if not panels:
        return None
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(4.2 * len(panels), 3.2), squeeze=False, layout="constrained"
    )
    for axis, (heading, points) in zip(axes[0], panels, strict=True):
        axis.plot(*zip(*points, strict=True), marker="." if len(points) < 60 else None)
        axis.set(title=heading, xlabel="epoch")
        axis.title.set_fontsize(10)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    try:
        return _save(lambda file, format: figure.savefig(file, format=format, dpi=120), path)
    finally:
        pyplot.close(figure)


def _numbers(records: Sequence[dict[str, Any]]) -> list[tuple[float, dict[str, float]]]:
    """(epoch, {name without its prefix: number}) of each record."""
    kept = []
    for number, record in enumerate(records):
        values = {name.rsplit("/", 1)[-1]: value for name, value in record.items() if isinstance(value, int | float)}
        kept.append((values.get("epoch", number), values))
    return kept
