"""Base and LoRA on the same prompts and the same noise: what each draws, how good and how varied it is.

`measure` (measuring.py) looks at one set of weights, `compare` sets two measurements against each other, pair by pair;
a training run measures before its first update and after its last, `evaluate` does both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import figures
from .config import EvalConfig
from .measuring import METRICS, LoadedLora, Measurement, Progress, encode_prompts, load_embedder, measure
from .metrics import DRIFT_SIGMAS, mean_and_stderr, paired_difference
from .models.sd3 import SD3
from .policy import Policy
from .prompts import Prompt
from .scoring import Scoring

__all__ = [
    "METRICS",
    "Evaluation",
    "LoadedLora",
    "Measurement",
    "compare",
    "encode_prompts",
    "evaluate",
    "load_embedder",
    "measure",
    "table",
]


@dataclass
class Evaluation:
    before: Measurement
    after: Measurement | None = None  # None: there is no LoRA

    def summary(self) -> dict[str, Any]:
        """`compare`, and under "categories" the table of every category, "overall" first."""
        return {**compare(self.before, self.after), "categories": table(self.before, self.after)}

    def save_picture(self, folder: str | Path, rows: int = 8, columns: int = 4) -> Path:
        """before_after.png, or grid.png of the base alone: prompts at even steps through the file, never picked."""
        before, after, total = self.before, self.after, len(self.before.prompts)
        number = len(before.prompt) // total
        columns = min(columns, number)
        chosen = torch.linspace(0, total - 1, min(rows, total)).round().long()
        texts = [before.prompts[i] for i in chosen.tolist()]

        def block(values: Tensor) -> Tensor:
            return values.unflatten(0, (total, number))[chosen, :columns]

        def flags(one: Measurement) -> list[list[bool | None]]:
            return [[None if value != value else bool(value) for value in row] for row in block(one.accuracy).tolist()]

        if after is None:
            return figures.grid(block(before.images).flatten(0, 1), columns, Path(folder) / "grid.png", texts)
        path = Path(folder) / "before_after.png"
        return figures.before_after(path, block(before.images), block(after.images), texts, flags(before), flags(after))


def evaluate(
    policy: Policy | None,
    model: SD3,
    scorer: Scoring | Any,
    prompts: Sequence[Prompt],
    config: EvalConfig,
    height: int,
    width: int,
    *,
    before: Measurement | None = None,
    progress: Callable[[str], Progress] | None = None,
    **options: Any,
) -> Evaluation:
    """Base, and LoRA where there is a policy. `before` is reused; `progress("before")` makes the callback of a phase.

    `options` are those of `measure`; the prompts are encoded once.
    """
    if options.get("condition") is None:
        options["condition"], options["negative"] = encode_prompts(model, prompts, config.guidance_scale)

    def run(weights: Policy | None, phase: str, reference: Measurement | None = None) -> Measurement:
        options["progress"] = progress(phase) if progress else None
        return measure(weights, model, scorer, prompts, config, height, width, reference=reference, **options)

    if before is None:
        with policy.reference() if policy else nullcontext():
            before = run(None, "before")
    return Evaluation(before, run(policy, "after", before) if policy else None)


def compare(before: Measurement, after: Measurement | None) -> dict[str, Any]:
    """{"before", "after": {metric: value}, "difference": {metric: {"mean", "stderr"}}, "by_sigma"}, None where not
    applicable.

    Differences are paired by noise, their errors clustered by prompt (`metrics.paired_difference`). The error of
    free_diversity is that of its unweighted mean over the prompts that have it both times. With them `by_sigma`.
    """
    if after is None:
        return {"before": before.summary(), "after": None, "difference": None, "by_sigma": None}
    if before.prompts != after.prompts or before.prompt.shape != after.prompt.shape:
        raise ValueError("the two measurements are of other prompts or other numbers of images: they cannot be paired")
    summary = {"before": before.summary(), "after": after.summary()}
    difference = {name: _paired(before, after, name) for name in before.metrics}
    first, second = before.free_diversity_mean, after.free_diversity_mean
    difference["free_diversity"]["mean"] = None if first is None or second is None else second - first
    return {**summary, "difference": difference, "by_sigma": by_sigma(after)}


def by_sigma(measured: Measurement) -> dict[str, Any] | None:
    """Where a LoRA differs from its base: {"sigmas": [...], metric: [{"mean", "stderr"} at each]}, for w2_drift and
    velocity_norm_ratio; errors clustered by prompt."""
    if not measured.by_sigma:
        return None
    found = {
        name: [mean_and_stderr(column, measured.prompt) for column in values.T]
        for name, values in measured.by_sigma.items()
    }
    return {"sigmas": list(DRIFT_SIGMAS), **found}


def _paired(before: Measurement, after: Measurement, name: str, rows: Tensor | None = None) -> dict[str, float | None]:
    clusters = before.clusters(name)
    rows = torch.ones(len(clusters), dtype=torch.bool) if rows is None else rows
    return paired_difference(before.values(name)[rows], after.values(name)[rows], clusters[rows])


def table(before: Measurement, after: Measurement | None = None) -> dict[str, dict[str, Any]]:
    """Per category, "overall" first: "images", "prompts", and per metric {"before", "after", "difference"}, each with
    "mean" and "stderr" (clustered by prompt)."""
    names = list(dict.fromkeys(name for name in before.categories if name is not None))
    groups = {"overall": range(len(before.prompts))}
    groups |= {name: [i for i, other in enumerate(before.categories) if other == name] for name in names}
    return {name: _row(before, after, torch.tensor(list(members))) for name, members in groups.items()}


def _row(before: Measurement, after: Measurement | None, members: Tensor) -> dict[str, Any]:
    row: dict[str, Any] = {"prompts": len(members), "images": int(torch.isin(before.prompt, members).sum())}
    for name in before.metrics:
        rows = torch.isin(before.clusters(name), members)
        cells = {"before": mean_and_stderr(before.values(name)[rows], before.clusters(name)[rows])}
        if after is not None:
            cells["after"] = mean_and_stderr(after.values(name)[rows], after.clusters(name)[rows])
            cells["difference"] = _paired(before, after, name, rows)
        row[name] = cells
    return row
