"""The alarm against reward hacking: the reward rises while a signal that nobody optimises falls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .evaluation import Measurement
from .metrics import paired_difference


class Alarm:
    """Compares every measurement with the best one so far, image by image at the same noise.

    The signal is the first watched reward, else the built-in world's accuracy. The alarm rings when the signal lies
    more than `stderrs` standard errors (clustered by prompt) below its best while the reward is higher than then. The
    best LoRA is kept in `path`, so a resumed run knows it too; of several processes only one is to `keep` it.
    """

    def __init__(self, path: Path, stderrs: float, keep: bool = True) -> None:
        self.path, self.stderrs, self.keep = path, stderrs, keep
        self.best: dict[str, Any] | None = torch.load(path, weights_only=True) if path.exists() else None

    def __call__(self, epoch: int, measured: Measurement, lora: dict[str, Tensor]) -> str | None:
        """What is wrong, or None. `lora` is the policy that was measured."""
        name, values = self.signal(measured)
        if self.best is None or values.nanmean() >= self.best["signal"].nanmean():
            self.best = {"epoch": epoch, "signal": values, "reward": measured.reward, "lora": lora}
            if self.keep:
                torch.save(self.best, self.path)
            return None
        fall = paired_difference(self.best["signal"], values, measured.prompt)
        rise = measured.reward.mean() - self.best["reward"].mean()
        if rise <= 0 or fall["stderr"] is None or fall["mean"] > -self.stderrs * fall["stderr"]:
            return None
        return (
            f"{name} fell by {-fall['mean']:.3f} ± {fall['stderr']:.3f} since epoch {self.best['epoch']} while the "
            f"reward rose by {rise:.3f}: the policy exploits the reward"
        )

    @staticmethod
    def signal(measured: Measurement) -> tuple[str, Tensor]:
        """Name and values (B,) of what is held out."""
        watched = [name for name in measured.scores if name.startswith("watch/")]
        return (watched[0], measured.scores[watched[0]]) if watched else ("accuracy", measured.accuracy)
