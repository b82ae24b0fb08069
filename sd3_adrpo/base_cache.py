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
from .rewards._mixed import named_parts
from .types import Rollout

Kept = TypeVar("Kept", Rollout, Measurement)
HOW = ("batch_size", "decode_batch_size", "overlap_scoring")  # a rollout is computed, not what is drawn


class BaseCache:
    """`folder` None keeps nothing. Files are named by all that their content depends on but the model's weights: use a
    folder per comparison."""

    def __init__(self, folder: str | None, config: Config, train: list[Prompt], test: list[Prompt]) -> None:
        self.folder = Path(folder).expanduser() if folder else None
        scores = [_reward(part) for reward in (config.reward, config.watch) for part in named_parts(reward).values()]
        common = [config.model, config.train.mixed_precision, _plain(config.reward), _plain(config.watch), scores]
        size = [getattr(config.rollout, name) for name in ("height", "width", "shift", "max_sequence_length")]
        self.names = {
            Rollout: _name("samples", *common, sampling(config, train)),
            Measurement: _name("before", *common, _plain(config.eval), size, list(map(_plain, test))),
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


def sampling(config: Config, prompts: list[Prompt]) -> str:
    """Names all that an epoch's samples depend on but the weights and the scores; batch sizes do not change images."""
    rollout = {name: value for name, value in _plain(config.rollout).items() if name not in HOW}
    pairs = getattr(config.objective, "pairs_file", None)
    rest = config.objective.noise_level, pairs and file_hash(pairs), list(map(_plain, prompts))
    return _name("sampling", config.seed, rollout, *rest)


def _reward(part: object) -> str | None:
    """Of a reward that is a function in a file: what the file says, which its options do not."""
    file = Path((getattr(part, "function", None) or "").rpartition(":")[0]).expanduser()
    return file_hash(file) if file.suffix == ".py" and file.is_file() else None


def _plain(options: object) -> dict:
    return dataclasses.asdict(options)


def _name(kind: str, *parts: object) -> str:
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
    return f"{kind}_{digest[:16]}.pt"
