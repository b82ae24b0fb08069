"""What a folder of a run, or of eval/evaluate.py, has to tell."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import log
from ..bootstrap import Ratio
from ..errors import UserError
from ..samples import load_samples

RESULTS = ("summary.json", "evaluation.json")  # of a training run, of an evaluation


@dataclass
class Source:
    """A finished run or an evaluation; `samples` and `log` are None and empty where it has none."""

    folder: Path
    name: str
    summary: dict[str, Any]
    samples: dict[str, Any] | None
    log: list[dict[str, Any]]  # one record per epoch
    config: str | None  # config.yaml as it stands
    evaluations: list[dict[str, Any]]  # the test prompts on the way, each with the number of epochs before it

    @property
    def metrics(self) -> list[str]:
        """Those that have a value."""
        return [name for name, value in self.summary["before"].items() if value is not None]

    @property
    def trained(self) -> bool:
        return self.summary["after"] is not None

    def ratio(self, metric: str, phase: str) -> Ratio | None:
        """The metric by prompt; None where single values were not saved."""
        values = self.samples and self.samples[phase] and self.samples[phase].get(metric)
        if not values:
            return None
        return Ratio.of(values, len(self.samples["prompts"]), self.samples[phase].get(f"{metric}_weight"))


def load(folders: Sequence[str | Path]) -> list[Source]:
    """UserError for a folder that holds no result."""
    names = _names([Path(folder) for folder in folders])
    return [_load(Path(folder), name) for folder, name in zip(folders, names, strict=True)]


def _load(folder: Path, name: str) -> Source:
    path = next((folder / result for result in RESULTS if (folder / result).is_file()), None)
    if path is None:
        state = "has neither a " + " nor an ".join(RESULTS) if folder.is_dir() else "is no folder"
        raise UserError(f"{folder} {state}: give the folder of a finished run or of an evaluation")
    config = folder / "config.yaml"
    return Source(
        folder=folder,
        name=name,
        summary=json.loads(path.read_text(encoding="utf-8")),
        samples=load_samples(folder),
        log=log.read(folder / "metrics.jsonl", "epoch"),
        evaluations=log.read(folder / "metrics.jsonl", "evaluation"),
        config=config.read_text(encoding="utf-8") if config.is_file() else None,
    )


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' last parts, with their parents where those are alike."""
    resolved = [folder.resolve() for folder in folders]
    for parts in range(1, 4):
        names = ["/".join(folder.parts[-parts:]) for folder in resolved]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({number})" for number, name in enumerate(names, 1)]
