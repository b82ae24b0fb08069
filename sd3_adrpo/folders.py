"""Folders of runs, and files that are written whole or not at all."""

from __future__ import annotations

import os
import time
from pathlib import Path


def dated_folder(name: str) -> Path:
    """A new `runs/DATE_NAME`, with a number behind it where several start in the same second."""
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    for number in range(1, 10_000):
        folder = Path("runs") / f"{stamp}_{name}{f'-{number}' if number > 1 else ''}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
    raise FileExistsError(f"runs/{stamp}_{name} and all its numbers are taken")


def write_whole(path: Path, text: str) -> None:
    """A crash leaves the old file or the new one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
