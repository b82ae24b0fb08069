"""What a run will do and need, found out before anything heavy loads. `--dry_run` prints it; every run checks it."""

from __future__ import annotations

import importlib.util
import os
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint import find_checkpoint
from .config import Config
from .cost import CALLS_PER_STEP
from .errors import UserError
from .model_files import ModelFiles, inspect_model
from .needs import disk_text, gb, memory_text, time_text
from .objective import check_rollout, trained_samples, updates_per_pass
from .prompt_choice import resolve_prompts
from .prompts import Prompt

POSITIVE = {
    "": "epochs checkpointing_epochs validation_epochs",
    "rollout": "prompts_per_epoch samples_per_prompt num_inference_steps batch_size decode_batch_size height width "
    "max_sequence_length",
    "train": "batch_size gradient_accumulation_steps sigmas_per_sample inner_epochs sigma_shift guidance_scale "
    "learning_rate max_grad_norm",
    "lora": "rank alpha",
    "eval": "samples_per_prompt num_inference_steps batch_size",
}


@dataclass
class Plan:
    train: list[Prompt]
    test: list[Prompt]
    description: dict[str, Any]  # of both prompt sets, see `resolve_prompts`
    model: ModelFiles
    lines: list[tuple[str, str]]  # what __str__ prints: heading and text

    def __str__(self) -> str:
        wrap = textwrap.TextWrapper(width=118, subsequent_indent=" " * 14, break_long_words=False)
        return "\n".join(wrap.fill(f"{heading:12}  {text}") for heading, text in self.lines)


def check(config: Config) -> Plan:
    """Raises UserError or PromptFileError for what would stop the run later. Loads no weights, asks no network."""
    _check_numbers(config)
    _check_options(config)
    train, test, description = resolve_prompts(config)
    _check_alarm(config, test)
    output = _output(config)
    model = inspect_model(config.model)
    lora, trained = _trained(config, model)
    lines = [
        ("prompts", _describe(description["train"])),
        ("test prompts", _describe(description["test"])),
        ("model", _describe_model(model)),
        ("reward", check_reward(config.reward, train + test)),
        *([] if config.watch.name == "none" else [("watch", check_reward(config.watch, train + test))]),
        ("objective", str(config.objective)),
        trained,
        ("epoch", _work(config)),
        ("measured", _measured(config, len(test))),
        ("memory", memory_text(config, model, lora)),
        ("time", time_text(config, model, test)),
        ("disk", disk_text(config, model, lora, output, train + test)),
        ("output", str(output or "a new dated folder under runs/")),
    ]
    return Plan(train, test, description, model, lines)


def _check_numbers(config: Config) -> None:
    for section, names in POSITIVE.items():
        for name in names.split():
            value = getattr(getattr(config, section) if section else config, name)
            if not value > 0:
                raise UserError(f"{section + '.' if section else ''}{name} is {value}; it must be positive")


def _check_options(config: Config) -> None:
    """What does not go together, or needs what is not installed."""
    check_rollout(config, int(os.environ.get("WORLD_SIZE", "1")))
    if config.rollout.fp8:
        from . import fp8  # late: loads torch

        fp8.check(config)
    if config.drift_limit is not None and not config.evaluation_epochs:
        raise UserError(
            f"drift_limit is {config.drift_limit:g}, and nothing would be measured before the end: give "
            "evaluation_epochs, e.g. 2, too"
        )
    if config.compile and config.finetune == "full":
        raise UserError("compile is for a LoRA, whose frozen reference is the same compiled transformer: leave it out")
    if config.train.optimizer == "adamw_8bit" and importlib.util.find_spec("torchao") is None:
        raise UserError("train.optimizer adamw_8bit needs torchao: pip install -e '.[lowbit]', or take adamw")


def _check_alarm(config: Config, test: list[Prompt]) -> None:
    from .shapes.grammar import parse

    if config.alarm != "off" and config.watch.name == "none" and not any(parse(prompt.text) for prompt in test):
        raise UserError(
            f"alarm is {config.alarm}, and there is nothing that it could listen to: --watch a second reward (only "
            "prompts of the built-in world have an accuracy)"
        )


def _output(config: Config) -> Path | None:
    """The run's folder, None for a new dated one. Refuses a non-empty one, unless resuming."""
    if config.resume_from_checkpoint:
        return find_checkpoint(config.resume_from_checkpoint, config.output_dir).parent.parent
    folder = Path(config.output_dir).expanduser() if config.output_dir else None
    if folder and folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir {folder} is a file: give a folder")
    first = os.environ.get("RANK", "0") == "0"  # of several processes it makes the folder, maybe before others look
    if first and folder and folder.is_dir() and any(folder.iterdir()):
        raise UserError(
            f"output_dir {folder} is not empty: give another, or go on with its run: --resume_from_checkpoint {folder}"
        )
    return folder


def check_reward(reward: Any, prompts: list[Prompt]) -> str:
    """One line about it; raises UserError when its model is not there or it cannot judge the prompts."""
    if hasattr(reward, "check_prompts"):
        reward.check_prompts(prompts)
    return reward.describe()


def _describe(part: dict[str, Any]) -> str:
    text = f"{part['prompts']} prompts, {part['part']} of {part['file']} (sha256 {part['sha256'][:12]})"
    if part["categories"]:
        text += "; " + ", ".join(f"{name} {count}" for name, count in part["categories"].items())
    if part.get("also_trained_on"):
        text += f"; {part['also_trained_on']} of them are trained on too"
    return text


def _describe_model(model: ModelFiles) -> str:
    if not model.parameters:
        return f"{model.name}, from the hub: not in the local cache, it will be downloaded (its size is not known yet)"
    parts = ", ".join(f"{name} {_millions(count)}" for name, count in model.parameters.items())
    if model.folder is None:
        return f"{model.name}, from the hub: not in the local cache, {gb(model.stored_bytes)} to download: {parts}"
    return f"{model.name} ({model.folder}), {gb(model.stored_bytes)} on disk: {parts}"


def _trained(config: Config, model: ModelFiles) -> tuple[int, tuple[str, str]]:
    """Number of trained weights, 0 where it is not known, and a line about them."""
    if config.finetune == "lora":
        count = model.lora_parameters(config.lora.target_modules, config.lora.rank)
        weights = f", {count:,} weights" if count else ""
        return count, ("LoRA", f"rank {config.lora.rank}, alpha {config.lora.alpha:g}{weights}")
    count = model.parameters.get("transformer") or 0
    text = f"{count:,} weights of the transformer" if count else "all weights of the transformer"
    return count, (
        "full",
        f"{text}, no LoRA: the lora options mean nothing; learning rate {config.train.learning_rate:g}",
    )


def _work(config: Config) -> str:
    rollout, train = config.rollout, config.train
    images = rollout.prompts_per_epoch * rollout.samples_per_prompt
    trained = trained_samples(config)
    some = f" of the {trained} trained on" if trained < images else ""
    guided = 2 if rollout.guidance_scale != 1 else 1
    sampling = rollout.num_inference_steps * CALLS_PER_STEP[rollout.solver] * guided
    draws = train.sigmas_per_sample * train.inner_epochs
    frozen = (train.sigmas_per_sample if train.reuse_noise else draws) * len(config.objective.needs)
    guided = ", each guided: one more" if train.guidance_scale != 1 else ""
    return (
        f"{images} images ({rollout.prompts_per_epoch} prompts x {rollout.samples_per_prompt}) of {rollout.width} x "
        f"{rollout.height}, {train.inner_epochs * updates_per_pass(config)} updates on one process; forward passes per "
        f"image: {sampling} to sample,{some} {frozen} for the reference, {draws} with backward{guided}; "
        f"{config.epochs} epochs"
    )


def _measured(config: Config, prompts: int) -> str:
    between = f", and every {config.evaluation_epochs} epochs" if config.evaluation_epochs else ""
    steps = config.eval.num_inference_steps * (2 if config.eval.guidance_scale != 1 else 1)
    return (
        f"before and after{between}, on {prompts * config.eval.samples_per_prompt} images ({prompts} prompts x "
        f"{config.eval.samples_per_prompt}) of {steps} forward passes each"
    )


def _millions(count: int | None) -> str:
    return "(not in safetensors, size unknown)" if count is None else f"{count / 1e6:.1f}M"
