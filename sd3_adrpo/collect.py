"""An epoch's samples: prompts -> latents -> images -> scores, each process its share, then the rows of all together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from .config import Config
from .errors import UserError
from .fp8 import in_float8
from .models.sd3 import SD3
from .overlap import worked_on
from .parallel import failing_together, gather_rows, share
from .policy import Policy
from .prompts import Prompt
from .rewards._images import quantise
from .rollout import sample, sample_path
from .scoring import Scoring
from .seeds import epoch_prompts, seed_for
from .types import Condition, Rollout

Sampled = tuple[Tensor, dict[str, Any], Tensor]  # of a batch: prompt (B,), latents, images (B, 3, H, W) in [0, 1]


class Collector:
    """Samples with the policy and scores what it drew. `done` are the finished batches of an epoch that is not."""

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        model: SD3,
        policy: Policy,
        scorer: Scoring,
        prompts: list[Prompt],
        condition: Condition,
        negative: Condition | None = None,
    ) -> None:
        self.config, self.accelerator, self.model, self.policy, self.scorer = config, accelerator, model, policy, scorer
        self.prompts, self.condition, self.negative = prompts, condition, negative
        rollout = config.rollout
        self.shape = model.latent_shape(rollout.height, rollout.width)
        self.sigmas = model.sigmas(rollout.num_inference_steps, rollout.shift, rollout.height, rollout.width)
        self.samples = rollout.prompts_per_epoch * rollout.samples_per_prompt
        self.mine = share(self.samples, accelerator)
        self.done: list[Rollout] = []
        self.parse_failures: dict[str, float] = {}  # in the last epoch, all processes together

    def __call__(self, epoch: int, progress: Callable[[str, int, int], None], check_stop: Callable) -> Rollout:
        """The epoch's rollout: images of this process's share, all else of all processes."""
        rollout = self.config.rollout
        chosen = epoch_prompts(len(self.prompts), rollout.prompts_per_epoch, epoch, self.config.seed)
        prompt = torch.tensor(chosen).repeat_interleave(rollout.samples_per_prompt)
        self.model.transformer.eval()
        counted = self.scorer.parse_failures
        with failing_together(self.accelerator), ExitStack() as weights:
            if self.config.objective.sampled_by_old:
                weights.enter_context(self.policy.old())
            weights.enter_context(self.policy.gathered())
            if rollout.merge_lora and not self.config.objective.noise_level:  # a path's velocities are trained on as is
                weights.enter_context(self.policy.merged())
            if rollout.fp8:
                weights.enter_context(in_float8(self.model.transformer))
            self._sample_mine(epoch, prompt[self.mine], progress, check_stop)
        self.parse_failures = self._summed({k: n - counted[k] for k, n in self.scorer.parse_failures.items()})
        mine, self.done = Rollout.cat(self.done), []
        scores = {name: self._gather(values) for name, values in mine.scores.items()}
        return replace(
            mine,
            prompt=prompt,
            clean=self._gather(mine.clean),
            rewards=self.scorer.total(scores),
            scores=scores,
            path=self._gather(mine.path),
            velocity=self._gather(mine.velocity),
        )

    def _sample_mine(self, epoch: int, prompt: Tensor, progress: Callable, check_stop: Callable) -> None:
        before = sum(len(part.prompt) for part in self.done)
        sampled = self._sampled(epoch, prompt, before, check_stop)
        for part in worked_on(sampled, self._scored, self.config.rollout.overlap_scoring):
            self.done.append(part)
            before += len(part.prompt)
            progress("sampling", before, len(prompt))

    def _sampled(self, epoch: int, prompt: Tensor, first: int, check_stop: Callable) -> Iterator[Sampled]:
        """Batches from sample `first` on."""
        rollout, numbers = self.config.rollout, range(self.samples)[self.mine]
        for start in range(first, len(prompt), rollout.batch_size):
            if self.accelerator.num_processes == 1:
                check_stop()
            rows = slice(start, start + rollout.batch_size)
            seeds = [seed_for(self.config.seed, "rollout", epoch, number) for number in numbers[rows]]
            latents = self._latents(prompt[rows], seeds)
            if not latents["clean"].isfinite().all():
                raise UserError(
                    f"epoch {epoch + 1} samples latents that are not finite, the weights are broken: go back to an "
                    "older checkpoint with a lower train.learning_rate, or leave fp16 for train.mixed_precision bf16"
                )
            yield prompt[rows], latents, self.model.decode(latents["clean"], rollout.decode_batch_size)

    def _scored(self, sampled: Sampled) -> Rollout:
        prompt, latents, images = sampled
        scores = self.scorer(images, [self.prompts[index] for index in prompt.tolist()])
        total = self.scorer.total(scores)
        return Rollout(prompt, rewards=total, images=quantise(images).cpu(), scores=scores, **latents)

    def _latents(self, prompt: Tensor, seeds: list[int]) -> dict[str, Any]:
        """One batch: `clean`, and where the objective needs them `path` and `velocity`."""
        rollout, level = self.config.rollout, self.config.objective.noise_level
        if level:
            path, velocity = sample_path(
                self.model, self.condition, prompt, seeds, self.sigmas, self.shape, level, self.policy.velocity
            )
            return {"clean": path[:, -1], "path": path, "velocity": velocity}
        clean = sample(
            self.model,
            self.condition,
            prompt,
            seeds,
            self.sigmas,
            self.shape,
            solver=rollout.solver,
            guidance_scale=rollout.guidance_scale,
            negative=self.negative,
            batch_size=rollout.batch_size,
            velocity=self.policy.velocity,
        )
        return {"clean": clean}

    def _summed(self, counts: dict[str, int]) -> dict[str, float]:
        """Over the processes."""
        if not counts:
            return {}
        values = torch.tensor(list(counts.values()), dtype=torch.float32, device=self.accelerator.device)
        return dict(zip(counts, self.accelerator.reduce(values, "sum").tolist(), strict=True))

    def _gather(self, values: Tensor | None) -> Tensor | None:
        return None if values is None else gather_rows(values, self.samples, self.accelerator)
