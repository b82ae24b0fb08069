"""A run's weights on its test prompts: before, on the way, after; and when what is measured must end the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import figures, log
from .alarm import Alarm
from .base_cache import BaseCache
from .collect import Collector
from .config import EvalConfig
from .evaluation import Measurement, measure
from .parallel import any_process
from .policy import Policy
from .prompts import Prompt
from .types import Condition

GRID_PROMPTS, GRID_IMAGES = 6, 4


class Judge:
    """`ended` is why the training has to end before its last epoch, None while it has not."""

    def __init__(
        self,
        collector: Collector,
        embedder: Any,
        prompts: list[Prompt],
        conditions: tuple[Condition, Condition | None],
        folder: Path,
    ) -> None:
        """Judges what the collector samples with, by its rewards, on these prompts."""
        self.config, self.accelerator, self.model = collector.config, collector.accelerator, collector.model
        self.policy, self.scorer = collector.policy, collector.scorer
        self.embedder, self.prompts, self.folder = embedder, prompts, folder
        self.condition, self.negative = conditions
        self.main = self.accelerator.is_main_process
        self.alarm = Alarm(folder / "best.pt", self.config.alarm_stderrs, self.main)
        self.base: Measurement | None = None  # by whose scores rewards in other units are normalised
        self.ended: str | None = None

    def before(self, resumed: bool, base_cache: BaseCache) -> Measurement:
        """The base, measured once per run."""
        path, before = self.folder / "before.pt", None
        if resumed and path.exists():
            saved = torch.load(path, weights_only=True)
            if saved.get("of") == base_cache.names[Measurement]:  # else it is measured otherwise now
                before = Measurement(**saved["value"])
        if any_process(before is None, self.accelerator):  # measuring takes all of them
            with self.policy.reference():
                before, _ = base_cache(Measurement, lambda: self._measure(None, "before"))
            if self.main:
                torch.save({"of": base_cache.names[Measurement], "value": vars(before)}, path)
        self.base = before
        if self.config.alarm != "off" and self.alarm.best is None:  # the base may stay the best
            self.alarm(0, before, self._weights())
        return before

    def on_the_way(self, epoch: int) -> None:
        """After so many epochs; may end the training."""
        measured = self._measure(self.policy, f"after epoch {epoch}", self.base)
        self._write({"kind": "evaluation", "epoch": epoch, **measured.summary()})
        if not self._hacked(epoch, measured):
            self._drifted(epoch, measured)

    def after(self, epoch: int, before: Measurement) -> Measurement:
        after = self._measure(self.policy, "after", before)
        if self._hacked(epoch, after) and self.config.alarm == "restore":
            after = self._measure(self.policy, "after restoring", before)
        return after

    def grid(self, epoch: int) -> None:
        """Fixed prompts and noise, so that the grids of a run can be flipped through."""
        chosen = torch.linspace(0, len(self.prompts) - 1, min(GRID_PROMPTS, len(self.prompts))).long()
        prompts = [self.prompts[i] for i in chosen]
        shape, field = self._field(chosen)
        options = EvalConfig(**(vars(self.config.eval) | {"samples_per_prompt": GRID_IMAGES}))
        with self.policy.gathered():
            shown = measure(None, self.model, self.scorer, prompts, options, *shape, **field)
        if self.main:
            path = self.folder / "grids" / f"epoch-{epoch:04d}.png"
            figures.grid(shown.images, GRID_IMAGES, path, [prompt.text for prompt in prompts])

    def _measure(self, policy: Policy | None, name: str, reference: Measurement | None = None) -> Measurement:
        total = len(self.prompts) * self.config.eval.samples_per_prompt
        bar = tqdm(total=total, desc=name, unit="img", disable=not self.main, dynamic_ncols=True)
        shape, field = self._field(torch.arange(len(self.prompts)))
        field |= {"progress": lambda done, _: bar.update(done - bar.n), "embedder": self.embedder}
        with bar, self.policy.gathered():
            options = self.config.eval
            return measure(policy, self.model, self.scorer, self.prompts, options, *shape, reference=reference, **field)

    def _field(self, chosen: torch.Tensor) -> tuple[tuple[int, int], dict[str, Any]]:
        """(height, width), and what `measure` has to know of these prompts."""
        rollout, negative = self.config.rollout, self.negative and self.negative.select(chosen)
        field = {"condition": self.condition.select(chosen), "negative": negative, "shift": rollout.shift}
        return (rollout.height, rollout.width), field | {"accelerator": self.accelerator}

    def _drifted(self, epoch: int, measured: Measurement) -> None:
        limit, drift = self.config.drift_limit, measured.summary()["w2_drift"]
        if limit is not None and drift > limit:
            self.ended = f"the drift is {drift:.4g}, above drift_limit {limit:.4g}"
            self._ring(epoch, self.ended)

    def _hacked(self, epoch: int, measured: Measurement) -> bool:
        """Whether the alarm rings and training is to end; with `restore` the best weights are back then."""
        if self.config.alarm == "off" or self.ended:
            return False
        message = self.alarm(epoch, measured, self._weights())
        if message is None:
            return False
        self._ring(epoch, message)
        if self.config.alarm == "warn":
            return False
        self.ended = message
        if self.config.alarm == "restore":
            self.policy.load_state_dict(self.alarm.best["lora"])
            self._say(f"the weights of epoch {self.alarm.best['epoch']} are restored")
        return True

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: value.to("cpu", copy=True) for name, value in self.policy.state_dict().items()}

    def _ring(self, epoch: int, message: str) -> None:
        self._say(f"ALARM: {message}")
        self._write({"kind": "alarm", "epoch": epoch, "message": message})

    def _write(self, row: dict[str, Any]) -> None:
        if self.main:
            log.append(self.folder / "metrics.jsonl", [row])

    def _say(self, text: str) -> None:
        if self.main:
            print(text, flush=True)
