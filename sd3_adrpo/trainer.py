"""The loop: sample with the policy, score, compare, update. One epoch reads top to bottom in `Trainer._epoch`."""

from __future__ import annotations

import signal
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
from .policy import Policy
from .prompts import Prompt
from .rollout import sample
from .scoring import Scoring
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
        scorer: Scoring,
        prompts: list[Prompt],
        condition: Condition,
        negative: Condition | None = None,
    ) -> None:
        self.config, self.accelerator, self.model, self.policy, self.scorer = config, accelerator, model, policy, scorer
        self.prompts, self.condition, self.negative = prompts, condition, negative
        rollout, train = config.rollout, config.train
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
        self.sampled: list[Rollout] = []  # the batches of an epoch that is not sampled to its end
        self.advantage = torch.zeros(0)
        self.stopped = False

    @property
    def updates_per_pass(self) -> int:
        samples = self.samples // self.accelerator.num_processes
        per_update = self.config.train.batch_size * self.config.train.gradient_accumulation_steps
        return max(1, round(samples / per_update))

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
        updates = [dict(zip(log, torch.stack(list(log.values())).tolist(), strict=True)) for log in logs]
        return metrics, updates

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
            images = self.model.decode(clean, rollout.batch_size)
            prompts = [self.prompts[index] for index in prompt[rows].tolist()]
            scores = self.scorer(images, prompts)
            images = (images * 255).round().to(torch.uint8).cpu()
            self.sampled.append(Rollout(prompt[rows], clean, self.scorer.total(scores), images, scores))
            progress("sampling", start + len(prompts), len(prompt))
        self.rollout, self.sampled = Rollout.cat(self.sampled), []
        rewards = self.scorer.total({name: self._gather(values) for name, values in self.rollout.scores.items()})
        self.rollout.rewards, prompts = rewards[self.mine], self._gather(prompt)
        advantage = self.advantages(rewards, prompts)
        self.spread = advantage.std(correction=0).item()
        clip = self.config.objective.clip
        self.advantage = advantage.clamp(-clip, clip)[self.mine]
        self.clip_rate = (advantage.abs() > clip).float().mean().item()

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
            "advantage_std": self.spread,
            "clip_rate": self.clip_rate,
            "learning_rate": self.scheduler.get_last_lr()[0],
        }

    # advantages -> loss -> LoRA

    def _update_pass(self, progress: Any) -> list[dict[str, Tensor]]:
        """One pass over the samples, with fresh noise: references first, in large batches, then the updates."""
        train, draws = self.config.train, self.config.train.sigmas_per_sample
        sigma, noise = self._draw_noise()
        reference = self._references(sigma, noise)
        count = len(self.advantage)
        order = torch.randperm(count, generator=generator_for(self.config.seed, "order", self.epoch, self.inner))
        logs = []
        for update, rows in enumerate(order.tensor_split(self.updates_per_pass)):
            if update < self.update:  # resumed in the middle of a pass
                continue
            self._check_stop()
            micro = rows.split(-(-len(rows) // train.gradient_accumulation_steps))
            for part in micro:
                loss, metrics = self._loss(part, sigma, noise, reference, draws)
                self.scaler.scale(loss * len(part) / len(rows)).backward()
            metrics["grad_norm"] = self._step()
            logs.append(metrics)
            self.update = update + 1
            progress(
                "training", self.inner * self.updates_per_pass + update + 1, train.inner_epochs * self.updates_per_pass
            )
        return logs

    def _draw_noise(self) -> tuple[Tensor, Tensor]:
        """sigma (B, draws) and noise (B, draws, C, h, w), the same whatever the batch size or number of processes."""
        train, seed = self.config.train, self.config.seed
        generator = generator_for(seed, "sigma", self.epoch, self.inner)
        sigma = stratified_sigmas(self.samples, train.sigmas_per_sample, train.sigma_shift, generator)[self.mine]
        names = [seed_for(seed, "noise", self.epoch, self.inner, number) for number in range(self.samples)[self.mine]]
        return sigma, seeded_noise(names, (train.sigmas_per_sample, *self.shape))

    @torch.no_grad()
    def _references(self, sigma: Tensor, noise: Tensor) -> Tensor:
        """v_ref (B, draws, C, h, w) in the model's dtype, from passes as large as the rollout's."""
        clean, prompt = self.rollout.clean, self.rollout.prompt
        draws, device = sigma.shape[1], self.model.device
        parts = []
        with self.policy.reference():
            for rows in torch.arange(len(clean)).split(max(1, self.config.rollout.batch_size // draws)):
                noisy = add_noise(
                    clean[rows].repeat_interleave(draws, 0), noise[rows].flatten(0, 1), sigma[rows].flatten()
                )
                condition = self.condition.select(prompt[rows].repeat_interleave(draws)).to(device)
                v = self.policy.velocity(noisy.to(device), sigma[rows].flatten().to(device), condition)
                parts.append(v.to(self.model.dtype).unflatten(0, (-1, draws)).cpu())
        return torch.cat(parts)

    def _loss(self, rows: Tensor, sigma: Tensor, noise: Tensor, reference: Tensor, draws: int):
        device = self.model.device
        clean = self.rollout.clean[rows].repeat_interleave(draws, 0).to(device)
        noise, sigma = noise[rows].flatten(0, 1).to(device), sigma[rows].flatten().to(device)
        batch = Batch(
            advantage=self.advantage[rows].repeat_interleave(draws).to(device),
            sigma=sigma,
            noisy=add_noise(clean, noise, sigma),
            target=velocity_target(clean, noise),
            reference=reference[rows].flatten(0, 1).to(device),
            condition=self.condition.select(self.rollout.prompt[rows].repeat_interleave(draws)).to(device),
        )
        velocity = self.policy.velocity(batch.noisy, batch.sigma, batch.condition)
        return self.config.objective.loss(velocity, batch)

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
            rollout = {**vars(self.rollout), "advantage": self.advantage}
            rollout |= {"spread": self.spread, "clip_rate": self.clip_rate}
        return {
            "progress": {"epoch": self.epoch, "inner": self.inner, "update": self.update},
            "lora": self.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "advantages": self.advantages.state_dict(),
            "rollout": rollout,
            "sampled": [vars(part) for part in self.sampled],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.policy.load_state_dict(state["lora"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.advantages.load_state_dict(state["advantages"])
        self.epoch, self.inner, self.update = (state["progress"][name] for name in ("epoch", "inner", "update"))
        if state["rollout"] is not None:
            saved = dict(state["rollout"])
            self.advantage, self.spread, self.clip_rate = (saved.pop(n) for n in ("advantage", "spread", "clip_rate"))
            self.rollout = Rollout(**saved)
        self.sampled = [Rollout(**part) for part in state.get("sampled", [])]
