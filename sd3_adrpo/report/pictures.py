"""Which images the page shows, and how they get into it.

All prompts are there. Of a prompt's images some are taken at even steps through their order by gain, the biggest loss
and the biggest gain among them: what failed is as easy to find as what went well, and nothing is picked by eye.
"""

from __future__ import annotations

import base64
import io
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from ..samples import LOSSLESS, image_path
from .sources import Source

BUDGET = 3_600_000  # characters of all images together: leaves room under 5 MB for the rest
SIZES = [(4, 384), (3, 384), (3, 320), (2, 320), (2, 256), (1, 256), (1, 192), (1, 128)]  # images a prompt, pixels
LADDER = [(4, 384, True)] + [(*size, False) for size in SIZES]  # and whether small images stay exact


def gallery(sources: list[Source], budget: int = BUDGET, most: int | None = None) -> dict[str, Any]:
    """{"images": data addresses, "prompts": what the page's script shows}, as many and large as the budget allows."""
    for number, pixels, exact in LADDER:
        if most is not None and number > most:
            continue
        found = _gallery(sources, number, pixels, exact)
        if sum(map(len, found["images"])) <= budget:
            return found
    return found  # thousands of prompts: all the same one small image each


def _gallery(sources: list[Source], number: int, pixels: int, exact: bool) -> dict[str, Any]:
    store: dict[str, int] = {}  # base images are the same in all runs: each address once
    prompts: dict[str, dict[str, Any]] = {}
    for index, source in enumerate(sources):
        samples = source.samples or {"prompts": []}
        for row, text in enumerate(samples["prompts"]):
            entry = prompts.setdefault(text, {"text": text, "category": samples["categories"][row], "runs": []})
            entry["runs"].append(_of_prompt(source, row) | {"run": index, "row": row})
    for entry in prompts.values():
        shown = _shown([run["gain"] for run in entry["runs"]], number)
        for run in entry["runs"]:
            _add_images(sources[run["run"]], run, shown, (pixels, exact), store)
    return {"images": list(store), "prompts": list(prompts.values())}


def _of_prompt(source: Source, row: int) -> dict[str, Any]:
    """Values of all its images, and per metric the prompt's own means before and after."""
    samples = source.samples
    count = samples["images_per_prompt"]
    sides = [samples["before"], samples["after"]]
    pick = lambda name: [side and side[name][row * count : (row + 1) * count] for side in sides]  # noqa: E731
    reward, accuracy = pick("reward"), pick("accuracy")
    after = reward[1] or reward[0]
    gain = [a - b for a, b in zip(after, reward[0], strict=True)] if reward[1] else list(reward[0])
    means = {"reward": [_mean(side) for side in reward], "accuracy": [_mean(side) for side in accuracy]}
    means["clip_diversity"] = [side and side["clip_diversity"][row] for side in sides]
    return {"reward": reward, "accuracy": accuracy, "gain": gain, "means": means}


def _mean(values: list[float | None] | None) -> float | None:
    known = [value for value in values or [] if value is not None]
    return sum(known) / len(known) if known else None


def _shown(gains: list[list[float]], number: int) -> list[int]:
    """At most `number` image numbers, the same for all runs: even steps through the order of their mean gain."""
    least = min(map(len, gains))
    mean = [sum(gain[i] for gain in gains) / len(gains) for i in range(least)]
    order = sorted(range(least), key=lambda i: (mean[i], i))
    number = min(number, least)
    steps = [round(step * (least - 1) / (number - 1)) for step in range(number)] if number > 1 else [least // 2]
    return [order[step] for step in steps]


def _add_images(source: Source, run: dict[str, Any], shown: list[int], form: tuple, store: dict[str, int]) -> None:
    """Leaves of the run's values those of the shown images, with their images' places in the store."""

    def address(phase: str, number: int) -> int:
        path = image_path(source.folder, phase, run["row"], number)
        return store.setdefault(_data_address(path, *form), len(store))

    after = run["reward"][1] is not None
    run["items"] = [
        {
            "number": number,
            "before": address("before", number),
            "after": address("after", number) if after else None,
            "reward": [side[number] if side else None for side in run["reward"]],
            "accuracy": [side[number] if side else None for side in run["accuracy"]],
        }
        for number in shown
    ]
    run["right"] = [_right(side) for side in run["accuracy"]]
    for name in ("reward", "accuracy", "gain", "row"):  # the page needs no more of them than the items have
        run.pop(name)


def _right(accuracy: list[float | None] | None) -> list[int] | None:
    """[right images, images]; None where the prompt has no answer."""
    return None if not accuracy or None in accuracy else [int(sum(accuracy)), len(accuracy)]


@cache  # the smaller numbers of images are among the larger
def _data_address(path: Path, pixels: int, exact: bool) -> str:
    """A copy of at most `pixels`; a small image's own file, unless it need not be `exact` and a copy is smaller."""
    data = path.read_bytes()
    with Image.open(io.BytesIO(data)) as picture:
        large = max(picture.size) > max(pixels, LOSSLESS)
        copy = picture.convert("RGB")
    if large:
        copy.thumbnail((pixels, pixels), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    copy.save(buffer, "webp", quality=80 if large else 90)
    if large or (not exact and buffer.tell() < len(data)):
        data = buffer.getvalue()
    return "data:image/webp;base64," + base64.b64encode(data).decode()
