"""The loop: sample with the policy, score, compare, update. One epoch reads top to bottom in `Trainer.run_epoch`."""

from __future__ import annotations

import signal
from typing import Any

import torch
from torch import Tensor

from .advantages import Advantages
from .base_cache import BaseCache, sampling
from .collect import Collector
from .draws import Draws, fresh_noise, path_steps
from .flat_rewards import FlatRewards
from .objective import check_rollout, updates_per_pass
from .optimizers import Optimization
from .parallel import any_process, share
from .rollout import training_velocity
from .seeds import generator_for
from .types import Rollout


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived; the state is consistent and can be saved."""


class Trainer:
    """Updates `policy` on its own samples. It knows no files: `run.py` saves, logs and evaluates around it.

    The state between two updates is (`epoch`, `inner`, `update`, the current `rollout` and its advantages) plus LoRA,
    optimiser, schedule and advantage statistics; everything random is seeded by name (seeds.py).
    """

    def __init__(self, collector: Collector, base_cache: BaseCache | None = None) -> None:
        """Trains what the collector samples with, on what it collects; the first epoch's may come from the cache."""
        self.collector, self.base_cache, config = collector, base_cache, collector.config
        self.config, self.accelerator, self.model = config, collector.accelerator, collector.model
        self.policy, self.scorer, self.objective = collector.policy, collector.scorer, config.objective
        self.prompts, self.condition, self.negative = collector.prompts, collector.condition, collector.negative
        self.shape, self.samples, self.mine = collector.shape, collector.samples, collector.mine
        check_rollout(config, self.accelerator.num_processes)
        self.advantages = Advantages(self.objective.advantage, self.condition.pooled)
        total = config.epochs * config.train.inner_epochs * self.updates_per_pass
        self.optimization = Optimization(self.policy, config.train, total, self.accelerator)
        self.epoch = self.inner = self.update = 0
        self.rollout: Rollout | None = None
        self.draws: Draws | None = None  # of the current pass, with `train.reuse_noise` of the epoch
        self.advantage = torch.zeros(0)
        self.weighing: dict[str, float] = {}  # the epoch's metrics of the advantages, and answers without a rating
        self.flat = FlatRewards()
        self.stopped, self.spared = False, 0.0  # seconds of sampling that the cache spared

    @property
    def updates_per_pass(self) -> int:
        return updates_per_pass(self.config, self.accelerator.num_processes)

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
        self.last_images = self.rollout.images, [self.prompts[i].text for i in self.rollout.prompt[self.mine].tolist()]
        self.epoch, self.inner, self.rollout = self.epoch + 1, 0, None
        updates = self.epoch * self.config.train.inner_epochs * self.updates_per_pass
        decay = self.objective.old_decay(self.epoch, updates)
        if decay is not None:
            self.policy.update_old(decay)
        return metrics, self._to_numbers(logs)

    def _to_numbers(self, logs: list[dict[str, Tensor]]) -> list[dict[str, float]]:
        """Sums over the processes, each of which has its part of a mean.

        Metrics stay on the device until here: one message, one wait per epoch.
        """
        if not logs:
            return []
        values = self.accelerator.reduce(torch.stack([torch.stack(list(log.values())) for log in logs]), "sum")
        return [dict(zip(log, row, strict=True)) for log, row in zip(logs, values.tolist(), strict=True)]

    # prompts -> latents -> images -> rewards -> advantages

    def _sample(self, progress: Any) -> None:
        self.last_images = None  # those of the epoch before: only one epoch's are kept

        def collect() -> Rollout:
            return self.collector(self.epoch, progress, self._check_stop)

        shared = self.epoch == 0 and self.base_cache
        self.rollout, self.spared = self.base_cache(Rollout, collect) if shared else (collect(), 0.0)
        self.collector.done = []  # batches of before an interruption, where the cache knew the whole since
        advantage = self.advantages(self.rollout.rewards, self.rollout.prompt)
        self.advantage, self.weighing = self.objective.weigh(advantage)
        self.weighing["advantage_std"] = advantage.std(correction=0).item()
        self.weighing |= self.collector.parse_failures
        if self.accelerator.is_main_process:
            self.flat.warn(self.scorer, self.rollout, advantage)

    def _rollout_metrics(self, rollout: Rollout) -> dict[str, float]:
        rewards = rollout.rewards
        _, group = rollout.prompt.unique(return_inverse=True)
        size = torch.bincount(group)
        mean = torch.zeros(len(size)).index_add_(0, group, rewards) / size
        return {
            "reward": rewards.mean().item(),
            **self.scorer.means(rollout.scores),
            "reward_std": rewards.std(correction=0).item(),
            "reward_std_within_prompt": (rewards - mean[group]).square().mean().sqrt().item(),
            # what a tilt by 1 + A / beta0 gains is this over beta0, to first order
            "advantage_reward_covariance": ((self.advantage - self.advantage.mean()) * rewards).mean().item(),
            "learning_rate": self.optimization.learning_rate,
            **self.weighing,
        }

    # advantages -> loss -> LoRA

    def _update_pass(self, progress: Any) -> list[dict[str, Tensor]]:
        """One pass over the samples: frozen velocities first, in large batches, then the updates.

        With `train.reuse_noise` a pass repeats the first one's updates: same samples, noise and frozen velocities.
        """
        train = self.config.train
        units = self.objective.units(self.advantage, self.config.rollout.samples_per_prompt)
        updates = self.order(len(units)).tensor_split(self.updates_per_pass)  # the same for any number of processes
        shares = [rows[share(len(rows), self.accelerator)] for rows in updates]
        if self.draws is None:
            self.draws = self._draw(units[torch.cat(shares)])  # this process's, in the order in which it trains on them
            self._freeze(self.draws)
        places = torch.arange(len(self.draws)).split([len(rows) for rows in shares])
        logs = []
        for update, (rows, place) in enumerate(zip(updates, places, strict=True)):
            if update < self.update:  # resumed in the middle of a pass
                continue
            self._check_stop()
            metrics: dict[str, Tensor] = {}
            for part in place.tensor_split(self._batches(len(rows))):
                batch, weight = self._batch(self.draws, part), len(part) / len(rows)
                velocity = training_velocity(self.policy.velocity, batch, train.guidance_scale)
                loss, found = self.objective.loss(velocity, batch)
                self.optimization.backward(loss * weight)
                metrics = {name: metrics.get(name, 0) + weight * value for name, value in found.items()}
            norm = self.optimization.step()
            metrics["grad_norm"] = norm / self.accelerator.num_processes  # the same on all, summed later
            logs.append(metrics)
            self.update = update + 1
            done = self.inner * self.updates_per_pass + update + 1
            progress("training", done, train.inner_epochs * self.updates_per_pass)
        if not train.reuse_noise or self.inner + 1 == train.inner_epochs:
            self.draws = None
        return logs

    def _batches(self, units: int) -> int:
        """Into which a process divides its part of an update: the same number on all, as sharded weights require."""
        longest = -(-units // self.accelerator.num_processes) * self.objective.members
        return min(-(-longest // self.config.train.batch_size), units // self.accelerator.num_processes)

    @property
    def _names(self) -> tuple[int, int, int]:
        """Of what is drawn for the current pass: run, epoch, and the pass that drew it first."""
        return self.config.seed, self.epoch, 0 if self.config.train.reuse_noise else self.inner

    def order(self, count: int) -> Tensor:
        """The units (count,) in the order of the current pass."""
        seed, *names = self._names
        return torch.randperm(count, generator=generator_for(seed, "order", *names))

    def _draw(self, units: Tensor) -> Draws:
        train, names = self.config.train, self._names
        if self.objective.noise_level:
            return path_steps(units, self.collector.sigmas, train.sigmas_per_sample, names)
        count, shift = train.sigmas_per_sample, train.sigma_shift
        return fresh_noise(units, self.samples, count, shift, self.shape, names, train.sigma_max)

    @torch.no_grad()
    def _freeze(self, draws: Draws) -> None:
        """Velocities that no update changes, in the model's type, from passes as large as the rollout's."""
        per_unit = draws.sigma.shape[1] * draws.units.shape[1]
        weights = {"reference": self.policy.reference, "old": self.policy.old}
        parts: dict[str, list[Tensor]] = {name: [] for name in self.objective.needs}
        for name, values in parts.items():
            with weights[name](), self.policy.gathered():
                for rows in torch.arange(len(draws)).split(max(1, self.config.rollout.batch_size // per_unit)):
                    batch = self._batch(draws, rows)
                    v = training_velocity(self.policy.velocity, batch, self.config.train.guidance_scale)
                    values.append(v.to(self.model.dtype).unflatten(0, (len(rows), -1)).cpu())
        shape = (len(draws), draws.sigma.shape[1], draws.units.shape[1], *self.shape)
        draws.frozen = {name: torch.cat(values).view(shape) for name, values in parts.items()}

    def _batch(self, draws: Draws, rows: Tensor):
        negative = self.negative if self.config.train.guidance_scale != 1 else None
        return draws.batch(rows, self.rollout, self.advantage, self.condition, self.model.device, negative)

    def _check_stop(self) -> None:
        """Where the state is whole, and all processes come by: they stop together."""
        if any_process(self.stopped, self.accelerator):
            raise Interrupted

    # state

    def state_dict(self) -> dict[str, Any]:
        """All processes must call it; with sharded weights only the main one gets them."""
        keep = self.accelerator.is_main_process
        whole = self.accelerator.num_processes == 1  # else a process has only its own images, which are for looking
        rollout = None
        if self.rollout is not None:
            rollout = {**vars(self.rollout), "advantage": self.advantage, "weighing": self.weighing}
            rollout["images"] = self.rollout.images if whole else None
        return {
            "progress": {"epoch": self.epoch, "inner": self.inner, "update": self.update},
            "lora": self.policy.state_dict(keep),
            "old": self.policy.old_state(keep),
            **self.optimization.state_dict(keep),
            "advantages": self.advantages.state_dict(),
            "rollout": rollout,
            "sampling": sampling(self.config, self.prompts),
            "sampled": [vars(part) for part in self.collector.done] if whole else [],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.policy.load_state_dict(state["lora"])
        self.policy.load_old_state(state["old"])
        self.optimization.load_state_dict(state)
        self.advantages.load_state_dict(state["advantages"])
        self.epoch, self.inner, self.update = (state["progress"][name] for name in ("epoch", "inner", "update"))
        self.rollout = self.draws = None
        if state.get("sampling") != sampling(self.config, self.prompts):  # the epoch begins anew, as is asked for now
            self.inner = self.update = 0
            return
        if state["rollout"] is not None:
            saved = dict(state["rollout"])
            self.advantage, self.weighing = saved.pop("advantage"), saved.pop("weighing")
            self.rollout = Rollout(**saved)
            if self.rollout.images is not None:
                self.rollout.images = self.rollout.images[self.mine]
        if self.accelerator.num_processes == 1:
            sampled = [Rollout(**part) for part in state["sampled"]]
            known = self.scorer.scorers.keys()  # under another reward the batches are drawn again
            self.collector.done = [part for part in sampled if part.scores.keys() == known]
