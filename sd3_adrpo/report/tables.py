"""The numbers of the page: each with its 95 % interval over prompts, differences paired by prompt and noise."""

from __future__ import annotations

from typing import Any

from ..bootstrap import Interval, Ratio, interval
from .sources import Source

TITLES = {
    "reward": ("Reward", ""),
    "accuracy": ("Accuracy", "share of images that show what the prompt asks for"),
    "clip_diversity": ("CLIP diversity", "1 − cosine within a prompt; also falls when wrong images vanish"),
    "free_diversity": ("Diversity of right images", "what the prompt leaves open; drawn by the world itself = 1"),
    "vendi": ("Vendi score", "effective number of different images of a prompt, by CLIP"),
    "dino_diversity": ("DINOv2 diversity", "1 − cosine within a prompt"),
    "lpips_diversity": ("LPIPS diversity", "mean perceptual distance within a prompt"),
    "w2_drift": ("Drift", "mean of |v − v_ref|², how far the model moved"),
    "velocity_norm_ratio": ("Velocity norm", "|v| / |v_ref|: above 1, pictures saturate"),
}
DISTANCES = {  # of sets of images
    "cmmd": ("CMMD", "1000 × squared MMD of unit embeddings; 0 is alike"),
    "fid": ("Fréchet distance", "of fitted Gaussians; 0 is alike, biased for few images"),
    "kid": ("KID", "squared MMD, unbiased; 0 is alike"),
    "precision": ("Precision", "share of images that look like the reference's"),
    "recall": ("Recall", "share of the reference that images look like"),
}
# where more is better
RISING = ("reward", "accuracy", "clip_diversity", "free_diversity", "vendi", "dino_diversity", "lpips_diversity")
PERCENT = ("accuracy", "precision", "recall")


def title(metric: str) -> str:
    return TITLES.get(metric, (metric.replace("_", " ").capitalize(), ""))[0]


def headline(sources: list[Source]) -> list[dict[str, Any]]:
    """A row per metric that any of the sources has, with a cell per source."""
    names = list(dict.fromkeys(name for source in sources for name in [*TITLES, *source.metrics]))
    rows = []
    for name in names:
        if any(name in source.metrics for source in sources):
            cells = [_cell(source, name) for source in sources]
            rows.append({"title": title(name), "note": _note(name, sources), "cells": cells})
    return rows + _scores(sources)


def _note(metric: str, sources: list[Source]) -> str:
    if metric == "reward":
        return " or ".join(dict.fromkeys(str(source.summary.get("reward", "")) for source in sources))
    text = TITLES.get(metric, ("", ""))[1]
    if metric == "vendi":  # comparable at equal n only
        having = [source for source in sources if source.samples and metric in source.metrics]
        numbers = dict.fromkeys(str(source.samples["images_per_prompt"]) for source in having)
        text += f"; n = {' or '.join(numbers)} images each" if numbers else ""
    return text


def _scores(sources: list[Source]) -> list[dict[str, Any]]:
    """A row per part of a mixed reward, and per score that is only watched, with standard errors."""
    found: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for index, source in enumerate(sources):
        parts, watched = (source.summary.get(kind) or {} for kind in ("rewards", "watch"))
        rows = [("Part", name, row) for name, row in parts.items() if len(parts) > 1]
        for kind, name, row in rows + [("Watched", name, row) for name, row in watched.items()]:
            found.setdefault((kind, name), {})[index] = row
    return [
        {
            "title": f"{kind}: {name}",
            "note": next(iter(of.values()))["unit"],
            "cells": [_of_score(of[index]) if index in of else None for index in range(len(sources))],
        }
        for (kind, name), of in found.items()
    ]


def _of_score(row: dict[str, Any]) -> dict[str, Any]:
    side = {phase: row[phase] and {"score": row[phase]["mean"]} for phase in ("before", "after")}
    return _from_summary({**side, "difference": {"score": row["difference"]}}, "score")


def distances(sources: list[Source]) -> dict[str, Any]:
    """{"columns": [(index of a source, "base" or "LoRA")], "rows": [{"title", "note", "cells"}]}."""
    found = {
        (index, name): values
        for index, source in enumerate(sources)
        for name, phase in (("base", "before"), ("LoRA", "after"))
        if (values := (source.summary.get("distances") or {}).get(phase))
    }
    rows = [
        {"title": heading, "note": note, "cells": [number(name, values.get(name)) for values in found.values()]}
        for name, (heading, note) in DISTANCES.items()
        if any(name in values for values in found.values())
    ]
    return {"columns": list(found), "rows": rows}


def categories(source: Source) -> list[dict[str, Any]]:
    """Reward and accuracy of every category, where the prompts have any."""
    found = source.samples["categories"] if source.samples else []
    rows = []
    for name in dict.fromkeys(category for category in found if category is not None):
        members = [number for number, category in enumerate(found) if category == name]
        cells = [_cell(source, metric, members) for metric in ("reward", "accuracy") if metric in source.metrics]
        rows.append({"title": name, "prompts": len(members), "cells": cells})
    return rows


def _cell(source: Source, metric: str, members: list[int] | None = None) -> dict[str, Any] | None:
    """{"before", "after", "difference", "verdict"} as texts; None where the source has no such metric."""
    if metric not in source.metrics:
        return None
    sides = [source.ratio(metric, phase) for phase in ("before", "after")]
    if sides[0] is None:  # a folder without samples: its own summary, with standard errors
        return _from_summary(source.summary, metric)
    if members is not None:
        sides = [side and side.only(members) for side in sides]
    return _texts(metric, *sides)


def _texts(metric: str, before: Ratio, after: Ratio | None) -> dict[str, Any]:
    digits = _digits(before.mean, after and after.mean)
    cell = {"before": number(metric, before.mean, digits), "after": None, "difference": None, "interval": None}
    cell |= {"before_interval": _between(metric, interval(before), digits), "verdict": ""}
    if after is not None:
        difference = interval(after, before)
        cell["after"] = number(metric, after.mean, digits)
        cell["difference"] = number(metric, difference and difference.mean, digits, sign=True)
        cell["interval"] = _between(metric, difference, digits, sign=True)
        cell["verdict"] = _verdict(metric, difference)
    return cell


def _from_summary(summary: dict[str, Any], metric: str) -> dict[str, Any]:
    before, after = summary["before"][metric], (summary["after"] or {}).get(metric)
    digits = _digits(before, after)
    cell = {"before": number(metric, before, digits), "before_interval": None, "interval": None}
    cell |= {"after": None, "difference": None, "verdict": ""}
    if after is not None:
        paired = summary["difference"][metric]
        cell["after"] = number(metric, after, digits)
        cell["difference"] = number(metric, paired["mean"], digits, sign=True)
        if paired["stderr"] is not None:
            cell["interval"] = f"± {number(metric, paired['stderr'], digits)} standard error"
    return cell


def _verdict(metric: str, difference: Interval | None) -> str:
    """ "better" or "worse" where the interval leaves zero out, "" where it does not, or where more is neither."""
    if metric not in RISING or difference is None or difference.low is None or difference.low <= 0 <= difference.high:
        return ""
    return "better" if difference.low > 0 else "worse"


def _between(metric: str, found: Interval | None, digits: int, sign: bool = False) -> str | None:
    if found is None or found.low is None:
        return None
    low, high = (number(metric, value, digits, sign) for value in (found.low, found.high))
    return f"{low.split(' ')[0]} to {high}"  # the unit once


def _digits(*values: float | None) -> int:
    """Decimals for values of this size and their differences."""
    size = max((abs(value) for value in values if value is not None), default=0.0)
    return 2 if size >= 10 else 3 if size >= 0.1 else 4


def number(metric: str, value: float | None, digits: int | None = None, sign: bool = False) -> str:
    """A value, or with `sign` a difference; shares in per cent and percentage points, with a true minus sign."""
    if value is None:
        return "–"
    if metric in PERCENT:
        text = f"{100 * value:+.1f} pp" if sign else f"{100 * value:.1f} %"
    else:
        text = f"{value:{'+' if sign else ''}.{_digits(value) if digits is None else digits}f}"
    return text.replace("-", "−")
