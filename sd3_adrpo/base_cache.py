"""What the base alone decides, kept for other runs: the first epoch's samples and the measurement before training.

A new LoRA changes nothing, so runs that differ only in objective or training options start from the same images.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from .config import Config
from .evaluation import Measurement
from .prompts import Prompt, file_hash
from .types import Rollout

Kept = TypeVar("Kept", Rollout, Measurement)


class BaseCache:
    """`folder` None keeps nothing. Files are named by all that their content depends on but the model's weights: use a
    folder per comparison."""

    def __init__(self, folder: str | None, config: Config, train: list[Prompt], test: list[Prompt]) -> None:
        self.folder = Path(folder).expanduser() if folder else None
        common = [config.model, config.train.mixed_precision, _plain(config.reward), _plain(config.watch)]
        rollout = [_plain(config.rollout), config.objective.noise_level]
        if pairs := getattr(config.objective, "pairs_file", None):
            rollout.append(file_hash(pairs))
        self.names = {
            Rollout: _name("samples", *common, config.seed, *rollout, [prompt.text for prompt in train]),
            Measurement: _name("before", *common, _plain(config.eval), rollout[0], [prompt.text for prompt in test]),
        }

    def __call__(self, kind: type[Kept], make: Callable[[], Kept]) -> tuple[Kept, float]:
        """The kept value or a made one, and the seconds that were spared: a comparison counts them."""
        if self.folder is None:
            return make(), 0.0
        path = self.folder / self.names[kind]
        if path.exists():
            saved = torch.load(path, weights_only=True)
            return kind(**saved["value"]), saved["seconds"]
        started = time.monotonic()
        value = make()
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        torch.save({"value": vars(value), "seconds": time.monotonic() - started}, temporary)
        os.replace(temporary, path)  # another run may be at it too
        return value, 0.0


def _plain(options: object) -> dict:
    return dataclasses.asdict(options)


def _name(kind: str, *parts: object) -> str:
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return f"{kind}_{digest[:16]}.pt"
