"""Curves and the reward-diversity picture as SVG, in the page's own colours and light or dark with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup, escape

from ..bootstrap import interval
from .sources import Source
from .tables import number, title

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 230, 52, 14, 14, 34  # pixels
Point = tuple[float, float]
CURVES = {"reward": "reward", "accuracy": "accuracy", "clip_diversity": "clip_diversity", "w2_drift": "w2"}
BY_SIGMA = {"w2_drift": "Drift by noise level", "velocity_norm_ratio": "|v| / |v_ref| by noise level"}
NOTES = {
    "epochs": "line: each epoch's own samples, points: test prompts",
    "tests": "points: test prompts",
    "sigma": "LoRA on test prompts; at σ = 1 all is noise",
}


def curves(sources: Sequence[Source]) -> list[dict[str, Any]]:
    """A chart per metric: the epochs' own samples as a line, the test prompts as points, whenever they were measured.

    Rewards of different units do not share one.
    """
    charts = []
    for metric, logged in CURVES.items():
        groups = _by_unit(sources) if metric == "reward" else {"": list(enumerate(sources))}
        for unit, group in groups.items():
            lines, marks = [], []
            for index, source in group:
                lines.append((index, [(r["epoch"] + 1, r[logged]) for r in source.log if r.get(logged) is not None]))
                marks.append((index, _measured(source, metric)))
            if any(len(line) > 1 for _, line in lines) or any(len(points) > 1 for _, points in marks):
                note = NOTES["epochs" if any(line for _, line in lines) else "tests"]
                heading = title(metric) + (f", {unit}" if len(groups) > 1 else "")
                charts.append({"title": heading, "note": note, "svg": _chart(metric, lines, marks)})
    return charts


def _by_unit(sources: Sequence[Source]) -> dict[str, list[tuple[int, Source]]]:
    groups: dict[str, list[tuple[int, Source]]] = {}
    for index, source in enumerate(sources):
        groups.setdefault(str(source.summary.get("reward", "")), []).append((index, source))
    return groups


def by_sigma(sources: Sequence[Source]) -> list[dict[str, Any]]:
    """Where along the noise a LoRA differs from its base, in size and in length of its velocities."""
    known = [(index, found) for index, source in enumerate(sources) if (found := source.summary.get("by_sigma"))]
    charts = []
    for metric, heading in BY_SIGMA.items():
        lines = [(index, found["sigmas"], found[metric]) for index, found in known if metric in found]
        if lines:
            charts.append({"title": heading, "note": NOTES["sigma"], "svg": _by_sigma(metric, heading, lines)})
    return charts


def _by_sigma(metric: str, heading: str, lines: Sequence[tuple[int, list[float], list[dict[str, Any]]]]) -> Markup:
    def ends(value: dict[str, Any]) -> Point:
        half = 1.96 * (value["stderr"] or 0.0)
        return value["mean"] - half, value["mean"] + half

    frame = Frame((0.0, 1.0), _range([end for _, _, values in lines for value in values for end in ends(value)]))
    parts = [frame.axes(metric, "σ")]
    for index, sigmas, values in lines:
        colour, rows = f"s{index % 8}", sorted(zip(sigmas, values, strict=True), key=lambda row: row[0])
        path = "L".join(frame.at((sigma, value["mean"])) for sigma, value in rows)
        parts.append(f'<path class="line {colour}" d="M{path}"/>')
        for sigma, value in rows:
            (x, y), (low, high) = frame.at((sigma, value["mean"])).split(","), ends(value)
            bottom, top = (frame.at((sigma, end)).split(",")[1] for end in (low, high))
            tip = escape(f"σ {sigma:g}: {number(metric, value['mean'])}")
            parts.append(f'<path class="bar {colour}" d="M{x},{bottom}V{top}"/>')
            parts.append(f'<circle class="mark {colour}" cx="{x}" cy="{y}" r="4.5"><title>{tip}</title></circle>')
    return frame.svg(parts, heading)


def _measured(source: Source, metric: str) -> list[Point]:
    if not source.trained or source.summary.get("epochs") is None:
        return []
    sides = {0: source.summary["before"], **{record["epoch"]: record for record in source.evaluations}}
    sides[source.summary["epochs"]] = source.summary["after"]
    return [(epoch, side[metric]) for epoch, side in sorted(sides.items()) if side.get(metric) is not None]


def _chart(metric: str, lines: list[tuple[int, list[Point]]], marks: list[tuple[int, list[Point]]]) -> Markup:
    points = [point for _, group in lines + marks for point in group]
    frame = Frame(_range([x for x, _ in points], whole=True), _range([y for _, y in points]))
    parts = [frame.axes(metric, "epoch", whole=True)]
    for index, line in lines:
        if line:
            path = " ".join(f"{'ML'[i > 0]}{frame.at(point)}" for i, point in enumerate(line))
            parts.append(f'<path class="line s{index % 8}" d="{path}"/>')
    for index, group in marks:
        for point in group:
            x, y = frame.at(point).split(",")
            tip = escape(f"test prompts, epoch {point[0]:g}: {number(metric, point[1])}")
            parts.append(f'<circle class="mark s{index % 8}" cx="{x}" cy="{y}" r="4.5"><title>{tip}</title></circle>')
    return frame.svg(parts, f"{title(metric)} over epochs")


def reward_diversity(sources: Sequence[Source]) -> list[dict[str, Any]]:
    """An arrow per run from base to LoRA, diversity across, reward up, with bars of 95 % over prompts; a chart for each
    unit of reward."""
    charts, groups = [], _by_unit(sources)
    for unit, group in groups.items():
        if runs := [(index, source) for index, source in group if "clip_diversity" in source.metrics]:
            heading = "Reward against diversity" + (f", {unit}" if len(groups) > 1 else "")
            charts.append({"title": heading, "svg": _reward_diversity(runs)})
    return charts


def _reward_diversity(runs: Sequence[tuple[int, Source]]) -> Markup:
    names = {index: source.name for index, source in runs}
    ends = [(index, [_end(source, phase) for phase in ("before", "after")]) for index, source in runs]
    ends = [(index, [end for end in both if end is not None]) for index, both in ends]
    every = [value for _, both in ends for end in both for value in end]
    frame = Frame(
        _range([v for value in every[0::2] for v in value]), _range([v for value in every[1::2] for v in value])
    )
    parts = [frame.axes("reward", "CLIP diversity")]
    for index, both in ends:
        colour = f"s{index % 8}"
        places = [frame.at((diversity[0], reward[0])).split(",") for diversity, reward in both]
        for (x, y), (diversity, reward) in zip(places, both, strict=True):
            left, right = (frame.at((value, 0)).split(",")[0] for value in diversity[1:])
            low, high = (frame.at((diversity[0], value)).split(",")[1] for value in reward[1:])
            parts.append(f'<path class="bar {colour}" d="M{left},{y}L{right},{y}M{x},{low}L{x},{high}"/>')
        if len(places) > 1:
            parts.append(_arrow(*[tuple(map(float, place)) for place in places], colour))
        for (x, y), name in zip(places, ("base", "LoRA"), strict=False):
            fill = "hollow" if name == "base" else ""
            tip = escape(f"{names[index]}, {name}")
            parts.append(f'<circle class="mark {colour} {fill}" cx="{x}" cy="{y}" r="5"><title>{tip}</title></circle>')
    return frame.svg(parts, "Reward against CLIP diversity, from base to LoRA")


def _end(source: Source, phase: str) -> tuple[tuple[float, float, float], tuple[float, float, float]] | None:
    """Diversity and reward, each as (mean, low, high)."""
    values = []
    for metric in ("clip_diversity", "reward"):
        mean = (source.summary[phase] or {}).get(metric)
        if mean is None:
            return None
        ratio = source.ratio(metric, phase)
        found = interval(ratio) if ratio else None
        values.append((mean, mean, mean) if found is None or found.low is None else (mean, found.low, found.high))
    return values[0], values[1]


def _arrow(start: Point, end: Point, colour: str) -> str:
    length = math.dist(start, end)
    if length < 14:
        return ""
    x, y = ((end[i] - start[i]) / length for i in (0, 1))
    tip, back = (end[0] - 6 * x, end[1] - 6 * y), (end[0] - 14 * x, end[1] - 14 * y)
    head = " ".join(f"{back[0] + side * 4 * -y:.1f},{back[1] + side * 4 * x:.1f}" for side in (1, -1))
    return (
        f'<path class="line {colour}" d="M{start[0]:.1f},{start[1]:.1f}L{back[0]:.1f},{back[1]:.1f}"/>'
        f'<polygon class="head {colour}" points="{tip[0]:.1f},{tip[1]:.1f} {head}"/>'
    )


def _range(values: Sequence[float], whole: bool = False) -> Point:
    low, high = min(values), max(values)
    if whole:
        return min(low, 0), max(high, 1)
    room = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    return (max(low - room, 0.0) if low >= 0 else low - room), high + room


class Frame:
    """Values to pixels, and the axes."""

    def __init__(self, x: Point, y: Point) -> None:
        self.x, self.y = x, y

    def at(self, point: Point) -> str:
        across = (point[0] - self.x[0]) / (self.x[1] - self.x[0])
        up = (point[1] - self.y[0]) / (self.y[1] - self.y[0])
        return f"{LEFT + across * (WIDTH - LEFT - RIGHT):.1f},{HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM):.1f}"

    def axes(self, metric: str, below: str, whole: bool = False) -> str:
        """Grid lines with their numbers; y in the metric's own form."""
        parts = []
        for value in _ticks(*self.y, 4):
            y = self.at((self.x[0], value)).split(",")[1]
            parts.append(f'<path class="grid" d="M{LEFT},{y}H{WIDTH - RIGHT}"/>')
            parts.append(
                f'<text class="tick" x="{LEFT - 8}" y="{y}" dy=".32em" text-anchor="end">{_tick(metric, value)}</text>'
            )
        for value in _ticks(*self.x, 5, whole):
            x = self.at((value, self.y[0])).split(",")[0]
            parts.append(f'<text class="tick" x="{x}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{value:g}</text>')
        parts.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">{below}</text>')
        return "".join(parts)

    def svg(self, parts: Sequence[str], label: str) -> Markup:
        return Markup(
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
        )


def _tick(metric: str, value: float) -> str:
    return f"{100 * value:g} %" if metric == "accuracy" else f"{value:g}".replace("-", "−")


def _ticks(low: float, high: float, about: int, whole: bool = False) -> list[float]:
    """Round numbers in [low, high], some `about` of them."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    step = max(1.0, step) if whole else step
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]
