"""Finished runs side by side: one record per run, means over seeds with intervals, equal images and equal time."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from . import log

METRICS = ("reward", "accuracy", "clip_diversity", "free_diversity", "w2_drift")
Record = dict[str, Any]


def record(folder: Path, label: str) -> Record:
    """What a comparison keeps of a finished run. `history` starts at the base and ends at the final weights."""
    summary = json.loads((folder / "summary.json").read_text())
    per_epoch = summary["images"] / summary["epochs"]
    seconds = [row["seconds"] for row in log.read(folder / "metrics.jsonl", "epoch")]
    points = [{"images": 0, "seconds": 0.0, **summary["before"]}]
    for row in log.read(folder / "metrics.jsonl", "evaluation"):
        values, spent = {name: row[name] for name in METRICS}, sum(seconds[: row["epoch"]])
        points.append({"images": int(row["epoch"] * per_epoch), "seconds": spent, **values})
    spent = sum(seconds)
    points.append({"images": summary["images"], "seconds": spent, **summary["after"]})
    kept = ("objective", "seed", "epochs", "images", "before", "after", "difference")
    early = summary["ended_early"]
    times = {"seconds": spent, "ended_early": early}
    return {"label": label, **{name: summary[name] for name in kept}, **times, "history": points}


def mean_and_interval(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and half-width of the 95 % interval by Student's t; None with under one, or under two values."""
    known = [value for value in values if value is not None]
    if not known:
        return None, None
    mean = math.fsum(known) / len(known)
    if len(known) < 2:
        return mean, None
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in known) / (len(known) - 1))
    return mean, float(stats.t.ppf(0.975, len(known) - 1)) * spread / math.sqrt(len(known))


def at_seconds(run: Record, seconds: float) -> dict[str, float | None]:
    """The run's metrics after so much training time, linear between its measurements; its last ones beyond them."""
    points = run["history"]
    for first, second in zip(points[:-1], points[1:], strict=True):
        if first["seconds"] <= seconds < second["seconds"]:
            share = (seconds - first["seconds"]) / (second["seconds"] - first["seconds"])
            return {
                name: None
                if first[name] is None or second[name] is None
                else _between(first[name], second[name], share)
                for name in METRICS
            }
    return {name: points[-1][name] for name in METRICS}


def _between(first: float, second: float, share: float) -> float:
    return first + share * (second - first)


def by_label(runs: Sequence[Record]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for run in runs:
        groups.setdefault(run["label"], []).append(run)
    return groups


def table(runs: Sequence[Record]) -> str:
    """Markdown: the finals at equal images, their differences to the first kind of run, and all at equal time."""
    parts = [_table(runs, "Equal images", lambda run: run["after"])]
    if len(by_label(runs)) > 1:
        seconds = min(run["seconds"] for run in runs)
        title = f"Equal time: after {seconds:.0f} s of training"
        parts += [_paired(runs), _table(runs, title, lambda run: at_seconds(run, seconds))]
    return "\n".join(parts)


def _paired(runs: Sequence[Record]) -> str:
    """Runs of one seed start from the same samples and are measured with the same noise: their differences vary less
    than they do."""
    first, *others = ((label, {run["seed"]: run["after"] for run in group}) for label, group in by_label(runs).items())
    lines = _head(f"Less {first[0]}, seed by seed", ["run", "seeds", *METRICS])
    for label, finals in others:
        seeds = sorted(finals.keys() & first[1].keys())
        cells = [_number(*mean_and_interval([_less(finals[s][m], first[1][s][m]) for s in seeds])) for m in METRICS]
        lines.append(f"| {label} | {len(seeds)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _less(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _head(title: str, heads: Sequence[str]) -> list[str]:
    rule = "|" + "---|" * len(heads)
    return [f"**{title}** (mean over seeds, ± 95 % interval)", "", "| " + " | ".join(heads) + " |", rule]


def _table(runs: Sequence[Record], title: str, values: Any) -> str:
    lines = _head(title, ["run", "seeds", *METRICS, "seconds"])
    first = runs[0]["before"]
    lines.append(f"| base | | {' | '.join(_number(first[name], None) for name in METRICS)} | |")
    for label, group in by_label(runs).items():
        cells = [_number(*mean_and_interval([values(run)[name] for run in group])) for name in METRICS]
        took = _number(*mean_and_interval([run["seconds"] for run in group]), digits=0)
        ended = sum(bool(run["ended_early"]) for run in group)
        note = f" ({ended} ended early)" if ended else ""
        lines.append(f"| {label}{note} | {len(group)} | {' | '.join(cells)} | {took} |")
    return "\n".join(lines) + "\n"


def _number(mean: float | None, half: float | None, digits: int | None = None) -> str:
    if mean is None:
        return ""
    digits = digits if digits is not None else 2 if abs(mean) >= 10 else 4 if abs(mean) < 0.1 else 3
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if half is not None else "")


def figures(runs: Sequence[Record], folder: Path, ceilings: dict[str, dict[str, float]] | None = None) -> list[Path]:
    """Reward against diversity and drift, and accuracy and reward over images. Faint: measurements on the way and each
    seed's end; starred: the end, the mean of the seeds with its 95 % interval.

    `ceilings`: name -> metrics of what the world allows. Those far above all runs are only named.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = list(by_label(runs))
    cycle = plt.get_cmap("tab10" if len(labels) <= 10 else "tab20").colors
    colours = {label: cycle[i % len(cycle)] for i, label in enumerate(labels)}
    plots = [(name, "reward") for name in ("clip_diversity", "free_diversity", "w2_drift")]
    plots += [("images", "accuracy"), ("images", "reward")]
    paths = []
    for x, y in plots:
        if all(run["after"].get(name) is None for run in runs for name in (x, y) if name != "images"):
            continue
        figure, axes = plt.subplots(figsize=(6.4, 4.8))
        for label, own in by_label(runs).items():
            _draw(axes, own, x, y, colours[label])
        base = runs[0]["before"]
        if x != "images" and base.get(x) is not None:
            axes.plot(base[x], base[y], "k*", markersize=13, label="base", zorder=4)
        _mark(axes, ceilings or {}, x, y)
        axes.set_xlabel(x.replace("_", " "))
        axes.set_ylabel(y)
        handles, labels = axes.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        beside = {"loc": "upper left", "bbox_to_anchor": (1.01, 1)} if len(unique) > 6 else {}  # else over the points
        axes.legend(unique.values(), unique.keys(), fontsize=8, frameon=False, **beside)
        path = folder / f"{y}_against_{x}.png"
        figure.savefig(path, dpi=110, bbox_inches="tight")
        plt.close(figure)
        paths.append(path)
    return paths


def _draw(axes: Any, runs: Sequence[Record], x: str, y: str, colour: tuple[float, ...]) -> None:
    """The runs of one label."""
    ends, over = [], {}
    faint = 0.15 if len(runs) > 1 else 0.35
    for run in runs:
        points = [(p[x], p[y]) for p in run["history"] if p[x] is not None and p[y] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), "-o", color=colour, alpha=faint, markersize=3, linewidth=1)
            axes.plot(*points[-1], "*", color=colour, alpha=0.4, markersize=6)
            ends.append(points[-1])
            for images, value in points:
                over.setdefault(images, []).append(value)
    if x == "images" and ends:
        axes.plot(sorted(over), [math.fsum(over[at]) / len(over[at]) for at in sorted(over)], color=colour)
    if ends:
        (across, width), (up, height) = (mean_and_interval(values) for values in zip(*ends, strict=True))
        sizes = {"xerr": width if x != "images" else None, "yerr": height, "elinewidth": 0.8}
        axes.errorbar(across, up, **sizes, fmt="*", color=colour, markersize=14, label=runs[0]["label"], zorder=3)


def _mark(axes: Any, ceilings: dict[str, dict[str, float]], x: str, y: str) -> None:
    low, high = axes.get_ylim()
    above = []
    for name, values in ceilings.items():
        if values.get(y) is None:
            continue
        if values[y] > high + (high - low) / 3:
            above.append(f"{name} {values[y]:.3g}")
            continue
        axes.axhline(values[y], color="0.6", linewidth=0.8, linestyle=":")
        axes.annotate(name, (1, values[y]), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=7)
    if above:
        axes.set_title("above: " + ", ".join(above), loc="right", fontsize=7)
