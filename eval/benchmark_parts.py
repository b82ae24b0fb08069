"""What the benchmark measures, each a comparison within one run. Names of results are explained in benchmark.py."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from benchmark_setup import PROMPTS, Setup
from timing import Breakdown, Clock, PeakMemory
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sd3_adrpo.config import Config
from sd3_adrpo.flow import add_noise, velocity_target
from sd3_adrpo.prompts import Prompt
from sd3_adrpo.rollout import sample
from sd3_adrpo.trainer import Trainer
from sd3_adrpo.types import Batch, Condition


class Rollouts:
    """Sampling of `batch` images: ours, the stock pipeline's, and the transformer calls alone."""

    def __init__(self, made: Setup, batch: int, steps: int) -> None:
        self.made, self.batch, self.steps = made, batch, steps
        rollout = made.config.rollout
        self.size = {"height": rollout.height, "width": rollout.width}
        self.shape = made.model.latent_shape(**self.size)
        self.sigmas = made.model.sigmas(steps, rollout.shift, **self.size)
        self.index = torch.arange(batch) * len(PROMPTS) // batch
        self.texts = [PROMPTS[i] for i in self.index.tolist()]
        self.noisy = torch.randn(batch, *self.shape).to(made.model.device)

    @torch.no_grad()
    def bare(self) -> None:
        """The floor: as many calls of the frozen transformer, without adapters, on our own condition."""
        made = self.made
        condition = made.condition.select(self.index).to(made.model.device)
        with made.policy.reference():
            for sigma in self.sigmas[:-1].tolist():
                made.model.velocity(self.noisy, torch.full((self.batch,), sigma, device=self.noisy.device), condition)

    def latents(self, merge: bool = True) -> Tensor:
        made = self.made
        with made.policy.merged() if merge else nullcontext():
            return sample(
                made.model,
                made.condition,
                self.index,
                range(self.batch),
                self.sigmas,
                self.shape,
                batch_size=self.batch,
                velocity=made.policy.velocity,
            )

    def images(self) -> Tensor:
        """Prompt to image; every prompt is encoded once."""
        if self.made.encodes:
            self.made.model.encode(PROMPTS)
        return self.made.model.decode(self.latents(), self.made.config.rollout.decode_batch_size)

    def stock_images(self) -> Tensor:
        """The same images by `StableDiffusion3Pipeline.__call__`, each prompt given once, without a LoRA."""
        made = self.made
        if made.encodes:
            what = {"prompt": PROMPTS, "num_images_per_prompt": self.batch // len(PROMPTS)}
        else:
            condition = made.stock_condition.select(self.index).to(made.model.device)
            what = {"prompt_embeds": condition.embeds, "pooled_prompt_embeds": condition.pooled}
        return made.stock(
            **what,
            **self.size,
            num_inference_steps=self.steps,
            guidance_scale=1.0,
            max_sequence_length=made.config.rollout.max_sequence_length,
            output_type="pt",
        ).images

    def flops(self) -> int:
        with FlopCounterMode(display=False) as counter:
            self.bare()
        return counter.get_total_flops()


class Training:
    """The updates on one epoch's samples: ours, and a loop that takes one noise level after the other."""

    def __init__(self, made: Setup) -> None:
        self.made, self.trainer = made, made.trainer()

    def ours(self) -> list[float]:
        """Losses of the updates."""
        return [float(log["loss"]) for log in _passes(self.trainer)]

    def serial(self, written_out: bool) -> list[float]:
        """Per update and noise level: a forward pass of the reference, one of the policy, and its backward.

        As DiffusionNFT's published loop does it (arXiv 2509.16117), at the training micro-batch, with the same draws.
        With `written_out` the transformer sees all text tokens, as stock diffusers hands them over.
        """
        trainer, train = self.trainer, self.made.config.train
        condition = self.made.stock_condition if written_out else self.made.condition
        losses = []
        for inner in range(train.inner_epochs):
            trainer.inner = inner
            for rows in trainer.order(trainer.samples).tensor_split(trainer.updates_per_pass):
                losses.append(0.0)
                for part in rows.split(train.batch_size):
                    draws = trainer._draw(part[:, None])
                    for draw in range(train.sigmas_per_sample):
                        loss = self._loss(part, draws.sigma[:, draw], draws.noise[:, draw], condition)
                        weight = len(part) / len(rows) / train.sigmas_per_sample
                        (loss * weight).backward()
                        losses[-1] += loss.item() * weight  # and its wait for the device
                trainer.optimization.step()
        return losses

    def _loss(self, rows: Tensor, sigma: Tensor, noise: Tensor, condition: Condition) -> Tensor:
        trainer, device = self.trainer, self.made.model.device
        clean, sigma, noise = (x.to(device) for x in (trainer.rollout.clean[rows], sigma, noise))
        condition = condition.select(trainer.rollout.prompt[rows]).to(device)
        noisy = add_noise(clean, noise, sigma)
        with torch.no_grad(), self.made.policy.reference():
            reference = self.made.policy.velocity(noisy, sigma, condition)
        advantage = trainer.advantage[rows].to(device)
        batch = Batch(advantage, sigma, noisy, velocity_target(clean, noise), reference, condition)
        velocity = self.made.policy.velocity(noisy, sigma, condition)
        return self.made.config.objective.loss(velocity, batch)[0]

    def flops(self) -> int:
        with FlopCounterMode(display=False) as counter:
            self.ours()
        return counter.get_total_flops()


def _passes(trainer: Trainer) -> list[dict[str, Tensor]]:
    trainer.model.transformer.train(trainer.config.train.gradient_checkpointing)
    logs = []
    for inner in range(trainer.config.train.inner_epochs):
        trainer.inner, trainer.update = inner, 0
        logs += trainer._update_pass(lambda *_: None)
    trainer.model.transformer.eval()
    return logs


def _without(config: Config) -> dict[str, tuple[str, str, Any]]:
    """Section, option and value that each take one optimisation back."""
    return {
        "merged LoRA": ("rollout", "merge_lora", False),
        "decoding in chunks": ("rollout", "decode_batch_size", config.rollout.batch_size),
        "batches larger than the training micro-batch": ("rollout", "batch_size", config.train.batch_size),
        "scoring beside sampling": ("rollout", "overlap_scoring", False),
    }


def _with(config: Config) -> dict[str, tuple[str, str, Any]]:
    """Those that each turn one on that is off because it changes results."""
    found = {"one noise for all inner epochs": ("train", "reuse_noise", True)} if config.train.inner_epochs > 1 else {}
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9):
        found["float8 rollouts"] = ("rollout", "fp8", True)
    return found


def _changed(config: Config, action: Callable[[], None], section: str, name: str, value: Any) -> Callable[[], None]:
    def call() -> None:
        options = getattr(config, section)
        before = getattr(options, name)
        setattr(options, name, value)
        try:
            action()
        finally:
            setattr(options, name, before)

    return call


MODEL_CALLS = ("transformer", "backward", "decoder", "reward")


def epoch(made: Setup, clock: Clock, repeats: int) -> dict[str, Any]:
    """A whole epoch against the sum of its transformer, decoder and reward calls; where its time goes, its memory."""
    trainer = made.trainer()
    watches, peak = [], {}

    def run() -> None:
        trainer.rollout, trainer.epoch, trainer.inner, trainer.update = None, 0, 0, 0
        trainer.run_epoch(lambda *_: None)

    one_by_one = _changed(made.config, run, "rollout", "overlap_scoring", False)  # else times of two threads mix

    def watched() -> None:
        watches.append(Breakdown(clock))
        with watches[-1].watching(
            (trainer, "_sample", "merging, advantages"),
            (trainer.collector, "_sample_mine", "sampling"),
            (trainer, "_draw", "noise"),
            (trainer, "_freeze", "reference pass"),
            (trainer, "_update_pass", "training"),
            (trainer.optimization, "step", "optimiser"),
            (trainer.model, "velocity", "transformer, {}"),
            (torch.Tensor, "backward", "backward"),
            (trainer.model, "decode", "decoder"),
            (trainer.scorer, "_score", "reward"),
        ):
            one_by_one()

    changes = {"without": _without(made.config), "with": _with(made.config)}
    actions = {
        f"{how} {name}": _changed(made.config, run, *change)
        for how, changed in changes.items()
        for name, change in changed.items()
    }
    compared = clock.compare({"epoch": run, "watched": watched, **actions}, repeats)
    seconds = compared["epoch"]
    names = sorted({name for watch in watches for name in watch.seconds})
    parts = {name: statistics.median(watch.seconds[name] for watch in watches[1:]) for name in names}
    parts["rest"] = max(0.0, seconds - sum(parts.values()))
    calls = sum(value for name, value in parts.items() if name.split(",")[0] in MODEL_CALLS)
    for name, phase in (("sampling", _phase(trainer, "_sample")), ("training", lambda: _passes(trainer))):
        with PeakMemory(made.model.device) as memory:
            phase()
        peak[name] = memory.bytes
    images = trainer.samples
    return {
        "images": images,
        "seconds": seconds,
        "images_per_second": images / seconds,
        "epoch_vs_parts": seconds / calls,
        "breakdown": dict(sorted(parts.items(), key=lambda item: -item[1])),
        "peak_memory_bytes": peak,
        "relative_seconds": {name: compared[name] / seconds for name in actions},
    }


def _phase(trainer: Trainer, method: str) -> Callable[[], None]:
    return lambda: getattr(trainer, method)(lambda *_: None)


def phases(made: Setup, rollouts: Rollouts, clock: Clock, repeats: int) -> dict[str, float]:
    """Images (or prompts) per second of the phases, alone."""
    latents = torch.randn(rollouts.batch, *rollouts.shape)
    images = made.model.decode(latents, rollouts.batch)
    vae = copy.deepcopy(made.stock.vae).to(memory_format=torch.contiguous_format)  # as diffusers loads it
    config = vae.config
    ready = latents.to(made.model.device, vae.dtype) / config.scaling_factor + config.shift_factor

    def stock_decode() -> None:
        with torch.no_grad():
            vae.decode(ready, return_dict=False)

    chunk = made.config.rollout.decode_batch_size
    actions = {
        "decoder": lambda: made.model.decode(latents, chunk),
        "decoder_stock": stock_decode,
        "reward": lambda: made.scorer(images, [Prompt(text) for text in rollouts.texts]),
    }
    if made.encodes:
        actions["text_encoding"] = lambda: made.model.encode(PROMPTS)
    seconds = clock.compare(actions, repeats)
    count = dict.fromkeys(actions, rollouts.batch) | {"text_encoding": len(PROMPTS)}
    return {name: count[name] / value for name, value in seconds.items()}
