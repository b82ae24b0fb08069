"""Folders of runs and of prompt embeddings, and files that are written whole or not at all."""

from __future__ import annotations

import os
import time
from pathlib import Path

from .config import Config


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


def text_cache_folder(config: Config) -> Path | None:
    """None for the built-in world, whose text encoders are small."""
    if config.model == "shapes" or config.text_cache == "none":
        return None
    if config.text_cache:
        return Path(config.text_cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sd3_adrpo" / "text"


def write_whole(path: Path, text: str) -> None:
    """A crash leaves the old file or the new one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
