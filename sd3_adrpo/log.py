"""metrics.jsonl: a record per line. torch is not needed to read it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def append(path: Path, records: Iterable[dict[str, Any]]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def read(path: str | Path, kind: str) -> list[dict[str, Any]]:
    """The records of a kind by epoch; [] without a file. Of an epoch that a resumed run repeated, the last one.

    An interrupted run may have cut its last line, which is left out.
    """
    epochs: dict[int, dict[str, Any]] = {}
    path = Path(path)
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.is_file() else []):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if record.get("kind", "epoch") == kind:
            epochs[record.get("epoch", number)] = record
    return [epochs[number] for number in sorted(epochs)]
