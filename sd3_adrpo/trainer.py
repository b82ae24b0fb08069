"""The loop: sample with the policy, score, compare, update. One epoch reads top to bottom in `Trainer._epoch`."""

from __future__ import annotations

import signal
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import Tensor

from .advantages import Advantages
from .config import Config
from .draws import Draws, fresh_noise, path_steps
from .errors import UserError
from .models.sd3 import SD3
from .policy import Policy
from .prompts import Prompt
from .rollout import sample, sample_path
from .scoring import Scoring
from .seeds import epoch_prompts, generator_for, seed_for
from .types import Condition, Rollout


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived; the state is consistent and can be saved."""


class Trainer:
    """Updates `policy` on its own samples. It knows no files: `run.py` saves, logs and evaluates around it.

    The state between two updates is (`epoch`, `inner`, `update`, the current `rollout` and its advantages) plus LoRA,
    optimiser, schedule and advantage statistics; everything random is seeded by name (seeds.py).
    """

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
        rollout, train = config.rollout, config.train
        self.objective = config.objective
        self.shape = model.latent_shape(rollout.height, rollout.width)
        self.sigmas = model.sigmas(rollout.num_inference_steps, rollout.shift, rollout.height, rollout.width)
        self.samples = rollout.prompts_per_epoch * rollout.samples_per_prompt
        if self.samples % accelerator.num_processes:
            raise UserError(
                f"{self.samples} images per epoch cannot be shared by {accelerator.num_processes} processes: "
                "make rollout.prompts_per_epoch * rollout.samples_per_prompt a multiple of them"
            )
        self.mine = slice(
            accelerator.process_index * self.samples // accelerator.num_processes,
            (accelerator.process_index + 1) * self.samples // accelerator.num_processes,
        )
        self._check_objective()
        self.advantages = Advantages(self.objective.advantage, condition.pooled)
        self.optimizer = torch.optim.AdamW(
            policy.parameters(),
            lr=train.learning_rate,
            betas=(train.adam_beta1, train.adam_beta2),
            weight_decay=train.adam_weight_decay,
            eps=train.adam_epsilon,
        )
        total = config.epochs * train.inner_epochs * self.updates_per_pass
        self.scheduler = get_scheduler(train.lr_scheduler, self.optimizer, train.lr_warmup_steps, total)
        self.scaler = torch.amp.GradScaler(enabled=train.mixed_precision == "fp16" and model.device.type == "cuda")
        self.epoch = self.inner = self.update = 0
        self.rollout: Rollout | None = None
        self.sampled: list[Rollout] = []  # the batches of an epoch that is not sampled to its end
        self.advantage = torch.zeros(0)
        self.stopped = False

    def _check_objective(self) -> None:
        objective, rollout = self.objective, self.config.rollout
        whole = len(range(self.samples)[self.mine]) % rollout.samples_per_prompt == 0
        if objective.units_per_group(rollout.samples_per_prompt) < 1:
            raise UserError(
                f"objective {objective.name} compares samples of a prompt: rollout.samples_per_prompt is "
                f"{rollout.samples_per_prompt}, it must be at least 2"
            )
        if not whole and objective.units_per_group(rollout.samples_per_prompt) < rollout.samples_per_prompt:
            raise UserError(
                f"objective {objective.name} chooses among a prompt's samples, but {self.accelerator.num_processes} "
                "processes would share one prompt's: make rollout.prompts_per_epoch a multiple of the processes"
            )
        if objective.noise_level and (rollout.guidance_scale != 1 or rollout.solver != "euler"):
            raise UserError(
                f"objective {objective.name} samples an SDE without guidance: leave out rollout.guidance_scale and "
                "rollout.solver"
            )
        steps = rollout.num_inference_steps - 1  # the last step of a path has no noise
        if objective.noise_level and self.config.train.sigmas_per_sample > steps:
            raise UserError(
                f"train.sigmas_per_sample is {self.config.train.sigmas_per_sample}, but a path of "
                f"{steps + 1} steps has {steps} to train on: raise rollout.num_inference_steps or lower the former"
            )

    @property
    def updates_per_pass(self) -> int:
        """The objective's samples over those of an update."""
        groups = self.samples // self.accelerator.num_processes / self.config.rollout.samples_per_prompt
        units = groups * self.objective.units_per_group(self.config.rollout.samples_per_prompt)
        per_update = self.config.train.batch_size * self.config.train.gradient_accumulation_steps
        return max(1, round(units * self.objective.members / per_update))

    def stop_on_signals(self) -> None:
        """From now on SIGINT and SIGTERM end the loop at the next update instead of at once."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: setattr(self, "stopped", True))

    def run_epoch(self, progress: Any) -> tuple[dict[str, float], list[dict[str, float]]]:
        """One epoch: metrics of the rollout, and of every update. `progress` is told (phase, done, total)."""
        if self.rollout is None:
            self._check_stop()
            self._sample(progress)
        self.policy.model.transformer.train(self.config.train.gradient_checkpointing)
        logs = []
        while self.inner < self.config.train.inner_epochs:
            logs += self._update_pass(progress)
            self.inner, self.update = self.inner + 1, 0
        metrics = self._rollout_metrics(self.rollout)
        self.last_images = self.rollout.images, [self.prompts[index].text for index in self.rollout.prompt.tolist()]
        self.epoch, self.inner, self.rollout = self.epoch + 1, 0, None
        updates = self.epoch * self.config.train.inner_epochs * self.updates_per_pass
        decay = self.objective.old_decay(self.epoch, updates)
        if decay is not None:
            self.policy.update_old(decay)
        rows = [dict(zip(log, torch.stack(list(log.values())).tolist(), strict=True)) for log in logs]
        return metrics, rows

    # prompts -> latents -> images -> rewards -> advantages

    def _sample(self, progress: Any) -> None:
        rollout = self.config.rollout
        chosen = epoch_prompts(len(self.prompts), rollout.prompts_per_epoch, self.epoch, self.config.seed)
        prompt = torch.tensor(chosen).repeat_interleave(rollout.samples_per_prompt)[self.mine]
        numbers = range(self.samples)[self.mine]
        self.model.transformer.eval()
        done = sum(len(part.prompt) for part in self.sampled)
        for start in range(done, len(prompt), rollout.batch_size):
            if self.accelerator.num_processes == 1:
                self._check_stop()
            rows = slice(start, start + rollout.batch_size)
            seeds = [seed_for(self.config.seed, "rollout", self.epoch, number) for number in numbers[rows]]
            clean, path, velocity = self._latents(prompt[rows], seeds)
            images = self.model.decode(clean, rollout.batch_size)
            prompts = [self.prompts[index] for index in prompt[rows].tolist()]
            scores = self.scorer(images, prompts)
            pixels = (images * 255).round().to(torch.uint8).cpu()
            total = self.scorer.total(scores)
            self.sampled.append(Rollout(prompt[rows], clean, total, pixels, scores, path, velocity))
            progress("sampling", start + len(prompts), len(prompt))
        self.rollout, self.sampled = Rollout.cat(self.sampled), []
        rewards = self.scorer.total({name: self._gather(values) for name, values in self.rollout.scores.items()})
        self.rollout.rewards = rewards[self.mine]
        advantage = self.advantages(rewards, self._gather(prompt))
        weight, self.weighing = self.objective.weigh(advantage)
        self.weighing["advantage_std"] = advantage.std(correction=0).item()
        self.advantage = weight[self.mine]

    def _latents(self, prompt: Tensor, seeds: list[int]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Samples of one batch, and the path and velocities where the objective needs them."""
        rollout, velocity = self.config.rollout, self.policy.velocity
        with self.policy.old() if self.objective.sampled_by_old else nullcontext():
            if self.objective.noise_level:
                level = self.objective.noise_level
                path, along = sample_path(
                    self.model, self.condition, prompt, seeds, self.sigmas, self.shape, level, velocity
                )
                return path[:, -1], path, along
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
                velocity=velocity,
            )
        return clean, None, None

    def _rollout_metrics(self, rollout: Rollout) -> dict[str, float]:
        rewards, prompts = self._gather(rollout.rewards), self._gather(rollout.prompt)
        _, group = prompts.unique(return_inverse=True)
        size = torch.bincount(group)
        mean = torch.zeros(len(size)).index_add_(0, group, rewards) / size
        scores = {name: self._gather(values) for name, values in rollout.scores.items()}
        return {
            "reward": rewards.mean().item(),
            **self.scorer.means(scores),
            "reward_std": rewards.std(correction=0).item(),
            "reward_std_within_prompt": (rewards - mean[group]).square().mean().sqrt().item(),
            "learning_rate": self.scheduler.get_last_lr()[0],
            **self.weighing,
        }

    # advantages -> loss -> LoRA

    def _update_pass(self, progress: Any) -> list[dict[str, Tensor]]:
        """One pass over the samples, with fresh noise: frozen velocities first, in large batches, then the updates."""
        train = self.config.train
        draws = self._draw()
        self._freeze(draws)
        order = torch.randperm(len(draws), generator=generator_for(self.config.seed, "order", self.epoch, self.inner))
        logs = []
        for update, rows in enumerate(order.tensor_split(self.updates_per_pass)):
            if update < self.update:  # resumed in the middle of a pass
                continue
            self._check_stop()
            for part in rows.split(-(-len(rows) // train.gradient_accumulation_steps)):
                batch = self._batch(draws, part)
                velocity = self.policy.velocity(batch.noisy, batch.sigma, batch.condition)
                loss, metrics = self.objective.loss(velocity, batch)
                self.scaler.scale(loss * len(part) / len(rows)).backward()
            metrics["grad_norm"] = self._step()
            logs.append(metrics)
            self.update = update + 1
            done = self.inner * self.updates_per_pass + update + 1
            progress("training", done, train.inner_epochs * self.updates_per_pass)
        return logs

    def _draw(self) -> Draws:
        train, numbers = self.config.train, range(self.samples)[self.mine]
        names, count = (self.config.seed, self.epoch, self.inner), train.sigmas_per_sample
        units = self.objective.units(self.advantage, self.config.rollout.samples_per_prompt)
        if self.objective.noise_level:
            return path_steps(units, numbers, self.sigmas, count, names)
        return fresh_noise(units, numbers, self.samples, count, train.sigma_shift, self.shape, names)

    @torch.no_grad()
    def _freeze(self, draws: Draws) -> None:
        """Velocities that no update changes, in the model's type, from passes as large as the rollout's."""
        per_unit = draws.sigma.shape[1] * draws.units.shape[1]
        weights = {"reference": self.policy.reference, "old": self.policy.old}
        parts: dict[str, list[Tensor]] = {name: [] for name in self.objective.needs}
        for rows in torch.arange(len(draws)).split(max(1, self.config.rollout.batch_size // per_unit)):
            batch = self._batch(draws, rows)
            for name in parts:
                with weights[name]():
                    v = self.policy.velocity(batch.noisy, batch.sigma, batch.condition)
                parts[name].append(v.to(self.model.dtype).unflatten(0, (len(rows), -1)).cpu())
        shape = (len(draws), draws.sigma.shape[1], draws.units.shape[1], *self.shape)
        draws.frozen = {name: torch.cat(values).view(shape) for name, values in parts.items()}

    def _batch(self, draws: Draws, rows: Tensor):
        return draws.batch(rows, self.rollout, self.advantage, self.condition, self.model.device)

    def _step(self) -> Tensor:
        """One optimiser step on the mean gradient of all processes, clipped; returns its norm before clipping."""
        self.scaler.unscale_(self.optimizer)
        parameters = [p for p in self.policy.parameters() if p.grad is not None]
        if self.accelerator.num_processes > 1:  # a LoRA's gradient is small: one message instead of DDP's buckets
            flat = self.accelerator.reduce(torch.cat([p.grad.flatten() for p in parameters]), "mean")
            for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                parameter.grad = part.view_as(parameter)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.train.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm.detach()

    def _gather(self, values: Tensor) -> Tensor:
        return self.accelerator.gather(values.to(self.accelerator.device)).cpu()

    def _check_stop(self) -> None:
        """Several processes stop between epochs only: within one, each holds samples that the others have not."""
        if self.stopped and (self.accelerator.num_processes == 1 or self.rollout is None):
            raise Interrupted

    # state

    def state_dict(self) -> dict[str, Any]:
        rollout = None
        if self.rollout is not None:
            rollout = {**vars(self.rollout), "advantage": self.advantage, "weighing": self.weighing}
        return {
            "progress": {"epoch": self.epoch, "inner": self.inner, "update": self.update},
            "lora": self.policy.state_dict(),
            "old": self.policy.old_state(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "advantages": self.advantages.state_dict(),
            "rollout": rollout,
            "sampled": [vars(part) for part in self.sampled],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.policy.load_state_dict(state["lora"])
        self.policy.load_old_state(state["old"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.advantages.load_state_dict(state["advantages"])
        self.epoch, self.inner, self.update = (state["progress"][name] for name in ("epoch", "inner", "update"))
        if state["rollout"] is not None:
            saved = dict(state["rollout"])
            self.advantage, self.weighing = saved.pop("advantage"), saved.pop("weighing")
            self.rollout = Rollout(**saved)
        self.sampled = [Rollout(**part) for part in state.get("sampled", [])]
