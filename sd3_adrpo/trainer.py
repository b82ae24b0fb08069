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
from .errors import UserError
from .flow import add_noise, seeded_noise, stratified_sigmas, velocity_target
from .models.sd3 import SD3
from .parallel import any_process, failing_together, gather_rows, share
from .policy import Policy
from .rewards.clip import ClipScorer, quantise
from .rollout import sample
from .seeds import epoch_prompts, generator_for, seed_for
from .types import Batch, Condition, Rollout


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
        scorer: ClipScorer,
        prompts: list[str],
        condition: Condition,
        negative: Condition | None = None,
    ) -> None:
        self.config, self.accelerator, self.model, self.policy, self.scorer = config, accelerator, model, policy, scorer
        self.prompts, self.condition, self.negative = prompts, condition, negative
        rollout, train = config.rollout, config.train
        self.shape = model.latent_shape(rollout.height, rollout.width)
        self.sigmas = model.sigmas(rollout.num_inference_steps, rollout.shift, rollout.height, rollout.width)
        self.samples = rollout.prompts_per_epoch * rollout.samples_per_prompt
        if self.samples < accelerator.num_processes:
            raise UserError(
                f"{self.samples} images per epoch are not enough for {accelerator.num_processes} processes: "
                "raise rollout.prompts_per_epoch or rollout.samples_per_prompt"
            )
        self.mine = share(self.samples, accelerator)
        self.advantages = Advantages(config.objective.advantage)
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
        self.advantage = torch.zeros(0)
        self.stopped = False

    @property
    def updates_per_pass(self) -> int:
        train = self.config.train
        per_update = train.batch_size * train.gradient_accumulation_steps * self.accelerator.num_processes
        return max(1, min(round(self.samples / per_update), self.samples // self.accelerator.num_processes))

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
        self.last_images = self.rollout.images, [self.prompts[i] for i in self.rollout.prompt[self.mine].tolist()]
        self.epoch, self.inner, self.rollout = self.epoch + 1, 0, None
        return metrics, self._to_numbers(logs)

    def _to_numbers(self, logs: list[dict[str, Tensor]]) -> list[dict[str, float]]:
        """Means over the processes. Metrics stay on the device until here: one message, one wait per epoch."""
        if not logs:
            return []
        values = self.accelerator.reduce(torch.stack([torch.stack(list(log.values())) for log in logs]), "mean")
        return [dict(zip(log, row, strict=True)) for log, row in zip(logs, values.tolist(), strict=True)]

    # prompts -> latents -> images -> rewards -> advantages

    def _sample(self, progress: Any) -> None:
        rollout = self.config.rollout
        chosen = epoch_prompts(len(self.prompts), rollout.prompts_per_epoch, self.epoch, self.config.seed)
        prompts = torch.tensor(chosen).repeat_interleave(rollout.samples_per_prompt)
        self.model.transformer.eval()
        weights = self.policy.merged() if rollout.merge_lora else nullcontext()
        with failing_together(self.accelerator), weights:
            clean, rewards, images = self._sample_mine(prompts[self.mine], progress)
        clean, rewards = (gather_rows(x, self.samples, self.accelerator) for x in (clean, rewards))
        self.rollout = Rollout(prompts, clean, rewards, images)
        advantage = self.advantages(rewards, prompts)
        self.spread = advantage.std(correction=0).item()
        clip = self.config.objective.clip
        self.advantage = advantage.clamp(-clip, clip)
        self.clip_rate = (advantage.abs() > clip).float().mean().item()

    def _sample_mine(self, prompt: Tensor, progress: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, rewards and uint8 images of this process's share of the epoch."""
        rollout, numbers, parts = self.config.rollout, range(self.samples)[self.mine], []
        for start in range(0, len(prompt), rollout.batch_size):
            if self.accelerator.num_processes == 1:
                self._check_stop()
            rows = slice(start, start + rollout.batch_size)
            clean = sample(
                self.model,
                self.condition,
                prompt[rows],
                [seed_for(self.config.seed, "rollout", self.epoch, number) for number in numbers[rows]],
                self.sigmas,
                self.shape,
                solver=rollout.solver,
                guidance_scale=rollout.guidance_scale,
                negative=self.negative,
                batch_size=rollout.batch_size,
                velocity=self.policy.velocity,
            )
            images = self.model.decode(clean, rollout.decode_batch_size)
            texts = [self.prompts[index] for index in prompt[rows].tolist()]
            rewards = self.scorer(images, texts)
            parts.append((clean, rewards, quantise(images).cpu()))
            progress("sampling", start + len(texts), len(prompt))
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

    def _rollout_metrics(self, rollout: Rollout) -> dict[str, float]:
        rewards = rollout.rewards
        _, group = rollout.prompt.unique(return_inverse=True)
        size = torch.bincount(group)
        mean = torch.zeros(len(size)).index_add_(0, group, rewards) / size
        return {
            "reward": rewards.mean().item(),
            "reward_std": rewards.std(correction=0).item(),
            "reward_std_within_prompt": (rewards - mean[group]).square().mean().sqrt().item(),
            "advantage_std": self.spread,
            "clip_rate": self.clip_rate,
            "learning_rate": self.scheduler.get_last_lr()[0],
        }

    # advantages -> loss -> LoRA

    def _update_pass(self, progress: Any) -> list[dict[str, Tensor]]:
        """One pass over the samples, with fresh noise: references first, in large batches, then the updates."""
        train = self.config.train
        updates = self.order().tensor_split(self.updates_per_pass)  # the same for any number of processes
        shares = [rows[share(len(rows), self.accelerator)] for rows in updates]
        mine = torch.cat(shares)  # this process's samples in the order in which it trains on them
        sigma, noise = self._draw_noise(mine)
        reference = self._references(mine, sigma, noise)
        places = torch.arange(len(mine)).split([len(rows) for rows in shares])
        logs = []
        for update, (rows, place) in enumerate(zip(updates, places, strict=True)):
            if update < self.update:  # resumed in the middle of a pass
                continue
            self._check_stop()
            for part in place.split(-(-len(place) // train.gradient_accumulation_steps)):
                loss, metrics = self._loss(mine[part], sigma[part], noise[part], reference[part])
                self.scaler.scale(loss * len(part) / len(rows)).backward()
            metrics["grad_norm"] = self._step()
            logs.append(metrics)
            self.update = update + 1
            progress(
                "training", self.inner * self.updates_per_pass + update + 1, train.inner_epochs * self.updates_per_pass
            )
        return logs

    def order(self) -> Tensor:
        """The samples (B,) in the order of the current pass."""
        return torch.randperm(self.samples, generator=generator_for(self.config.seed, "order", self.epoch, self.inner))

    def _draw_noise(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """sigma (B, draws) and noise (B, draws, C, h, w) of these samples, whatever batch or process they are in."""
        train, seed = self.config.train, self.config.seed
        generator = generator_for(seed, "sigma", self.epoch, self.inner)
        sigma = stratified_sigmas(self.samples, train.sigmas_per_sample, train.sigma_shift, generator)[rows]
        names = [seed_for(seed, "noise", self.epoch, self.inner, number) for number in rows.tolist()]
        return sigma, seeded_noise(names, (train.sigmas_per_sample, *self.shape))

    @torch.no_grad()
    def _references(self, rows: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        """v_ref (B, draws, C, h, w) in the model's dtype, from passes as large as the rollout's."""
        clean, prompt = self.rollout.clean[rows], self.rollout.prompt[rows]
        draws, device = sigma.shape[1], self.model.device
        parts = []
        with self.policy.reference():
            for part in torch.arange(len(rows)).split(max(1, self.config.rollout.batch_size // draws)):
                noisy = add_noise(
                    clean[part].repeat_interleave(draws, 0), noise[part].flatten(0, 1), sigma[part].flatten()
                )
                condition = self.condition.select(prompt[part].repeat_interleave(draws)).to(device)
                v = self.policy.velocity(noisy.to(device), sigma[part].flatten().to(device), condition)
                parts.append(v.to(self.model.dtype).unflatten(0, (-1, draws)).cpu())
        return torch.cat(parts)

    def _loss(self, rows: Tensor, sigma: Tensor, noise: Tensor, reference: Tensor):
        device, draws = self.model.device, sigma.shape[1]
        clean = self.rollout.clean[rows].repeat_interleave(draws, 0).to(device)
        noise, sigma = noise.flatten(0, 1).to(device), sigma.flatten().to(device)
        batch = Batch(
            advantage=self.advantage[rows].repeat_interleave(draws).to(device),
            sigma=sigma,
            noisy=add_noise(clean, noise, sigma),
            target=velocity_target(clean, noise),
            reference=reference.flatten(0, 1).to(device),
            condition=self.condition.select(self.rollout.prompt[rows].repeat_interleave(draws)).to(device),
        )
        velocity = self.policy.velocity(batch.noisy, batch.sigma, batch.condition)
        return self.config.objective.loss(velocity, batch)

    def _step(self) -> Tensor:
        """One optimiser step on the summed gradient of all processes, clipped; returns its norm before clipping."""
        parameters = [p for p in self.policy.parameters() if p.grad is not None]
        if self.accelerator.num_processes > 1:  # a LoRA's gradient is small: one message instead of DDP's buckets
            flat = self.accelerator.reduce(torch.cat([p.grad.flatten() for p in parameters]), "sum")
            for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                parameter.grad = part.view_as(parameter)
        self.scaler.unscale_(self.optimizer)  # after the sum, in which one process's overflow reaches all
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.train.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm.detach()

    def _check_stop(self) -> None:
        """Where the state is whole, and all processes come by: they stop together."""
        if any_process(self.stopped, self.accelerator):
            raise Interrupted

    # state

    def state_dict(self) -> dict[str, Any]:
        rollout = None
        if self.rollout is not None:
            rollout = {"prompt": self.rollout.prompt, "clean": self.rollout.clean, "rewards": self.rollout.rewards}
            whole = self.accelerator.num_processes == 1  # else a process has only its own images, which are for looking
            rollout |= {"images": self.rollout.images if whole else None, "advantage": self.advantage}
            rollout |= {"spread": self.spread, "clip_rate": self.clip_rate}
        return {
            "progress": {"epoch": self.epoch, "inner": self.inner, "update": self.update},
            "lora": self.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "advantages": self.advantages.state_dict(),
            "rollout": rollout,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.policy.load_state_dict(state["lora"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.advantages.load_state_dict(state["advantages"])
        self.epoch, self.inner, self.update = (state["progress"][name] for name in ("epoch", "inner", "update"))
        if state["rollout"] is not None:
            saved = state["rollout"]
            images = None if saved["images"] is None else saved["images"][self.mine]
            self.rollout = Rollout(saved["prompt"], saved["clean"], saved["rewards"], images)
            self.advantage, self.spread, self.clip_rate = saved["advantage"], saved["spread"], saved["clip_rate"]
