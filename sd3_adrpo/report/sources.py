"""What a folder of a run, or of eval/evaluate.py, has to tell."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        log=_read_log(folder / "metrics.jsonl", "epoch"),
        evaluations=_read_log(folder / "metrics.jsonl", "evaluation"),
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


def _read_log(path: Path, kind: str) -> list[dict[str, Any]]:
    """The records of a kind; an interrupted run may have cut its last line, a resumed one may repeat an epoch."""
    epochs: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if record.get("kind") == kind:
            epochs[record["epoch"]] = record
    return [epochs[number] for number in sorted(epochs)]
