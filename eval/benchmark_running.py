"""Measures of whole epochs by the wall's clock and the process's memory: see benchmark.py."""

from __future__ import annotations

import statistics
import time

import psutil
import torch
from benchmark_setup import Setup
from torch import Tensor

from sd3_adrpo.scoring import Scoring
from sd3_adrpo.trainer import Trainer


class Waiting:
    """A reward that computes elsewhere, as a server does: it sleeps."""

    unit = encoder = "none"

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, images: Tensor, prompts: list) -> Tensor:
        time.sleep(self.seconds)
        return images.mean((1, 2, 3)).cpu()


def waiting_reward(made: Setup, repeats: int) -> float:
    """Seconds of the wall to sample an epoch of four batches, one after the other / side by side: 8 / 5 at best."""
    rollout, scorer = made.config.rollout, made.scorer
    before = rollout.batch_size, rollout.overlap_scoring
    rollout.batch_size = max(1, rollout.prompts_per_epoch * rollout.samples_per_prompt // 4)
    try:
        trainer = made.trainer()
        trainer.scorer = trainer.collector.scorer = Scoring({"waiting": Waiting(0.0)})
        _sampling(trainer, False)  # warms up
        batch = _sampling(trainer, False) / 4
        trainer.scorer = trainer.collector.scorer = Scoring({"waiting": Waiting(batch)})
        seconds = {
            beside: statistics.median(_sampling(trainer, beside) for _ in range(repeats)) for beside in (False, True)
        }
    finally:
        made.scorer, (rollout.batch_size, rollout.overlap_scoring) = scorer, before
    return seconds[False] / seconds[True]


def _sampling(trainer: Trainer, beside: bool) -> float:
    trainer.config.rollout.overlap_scoring = beside
    start = time.perf_counter()
    trainer._sample(lambda *_: None)
    return time.perf_counter() - start


def flat_memory(made: Setup, epochs: int) -> int:
    """Prints the memory after each epoch: the process's resident set, and on a GPU the most that was allocated there.

    Twice: with the epoch as configured and with four times its prompts, at the same batches.
    """
    made.stock, rollout = None, made.config.rollout
    for times in (1, 4):
        rollout.prompts_per_epoch *= times
        trainer = made.trainer()
        trainer.rollout = None
        sizes = []
        for _ in range(epochs):
            if made.model.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            trainer.run_epoch(lambda *_: None)
            sizes.append(_bytes(made.model.device))
        print(f"{trainer.samples} images per epoch, {epochs} epochs")
        for name in sizes[0]:
            series = [size[name] / 1e6 for size in sizes]
            print(f"  {name}, MB: " + " ".join(f"{value:.1f}" for value in series))
            print(f"  {name} of the last epoch / the second: {series[-1] / series[min(1, epochs - 1)]:.4f}")
    return 0


def _bytes(device: torch.device) -> dict[str, int]:
    found = {"resident": psutil.Process().memory_info().rss}
    if device.type == "cuda":
        found["allocated at most"] = torch.cuda.max_memory_allocated()
    return found
