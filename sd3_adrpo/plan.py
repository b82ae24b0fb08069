"""What a run will do and need, found out before anything heavy loads. `--dry_run` prints it; every run checks it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint import find_checkpoint
from .config import Config
from .cost import CALLS_PER_STEP, FRACTION_OF_PEAK, epoch_flops, memory
from .errors import UserError
from .machine import installed_memory, matrix_speed
from .model_files import ModelFiles, inspect_model
from .objective import check_rollout, trained_samples, updates_per_pass
from .prompt_choice import resolve_prompts
from .prompts import Prompt

KEPT_CHECKPOINTS = 3  # two that stay and the one being written
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
        ("memory", _memory(config, model, lora)),
        ("time", _time(config, model)),
        ("disk", _disk(config, lora, output)),
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
        return f"{model.name}, from the hub: not in the local cache, {_gb(model.stored_bytes)} to download: {parts}"
    return f"{model.name} ({model.folder}), {_gb(model.stored_bytes)} on disk: {parts}"


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


def _memory(config: Config, model: ModelFiles, lora: int) -> str:
    """Rough, and not yet compared with a GPU: cost.py."""
    if not model.config:
        return "not known before the model is here"
    need = memory(config, model, lora)
    name, total = installed_memory()
    return (
        f"{_gb(need.encoding)} while prompts are encoded; {_gb(need.frozen)} frozen weights, {_gb(need.lora)} "
        f"trained weights with optimiser, then {_gb(need.sampling)} to sample or {_gb(need.training)} of activations "
        f"to train (rough figures), and the reward's model besides; {name} has {_gb(total)}"
        + (
            ": THIS MAY NOT FIT; lower train.batch_size, or set train.gradient_checkpointing"
            if total and need.peak > total
            else ""
        )
    )


def _time(config: Config, model: ModelFiles) -> str:
    """Seconds from operations, at the speed of a matrix product measured here and the share of it that we expect."""
    if not model.config or os.environ.get("RANK", "0") != "0":  # one process measures, and prints
        return "not known before the model is here"
    import torch

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    fraction = FRACTION_OF_PEAK[kind][config.train.mixed_precision]
    speed = fraction * matrix_speed(kind, config.train.mixed_precision)
    work = epoch_flops(config, model)
    return (
        f"about {_duration(work / speed)} per epoch on one process, the reward besides: {work / 1e12:.3g} TFLOP, at "
        f"{fraction:.0%} of the speed of matrix products here"
    )


def _disk(config: Config, lora: int, output: Path | None) -> str:
    """12 bytes per LoRA weight in a checkpoint (value and Adam's moments), with the epoch's images and latents."""
    rollout = config.rollout
    pixels = rollout.prompts_per_epoch * rollout.samples_per_prompt * rollout.height * rollout.width
    checkpoint = 12 * lora + pixels * 3 + pixels // 64 * 16 * 4
    need = KEPT_CHECKPOINTS * checkpoint + 4 * lora + 20 * 2**20  # and pictures and logs
    folder = (output or Path("runs")).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if need > free:
        raise UserError(
            f"the run needs about {_gb(need)} in {folder}, where {_gb(free)} are free: make room, or give an "
            "--output_dir on another disk"
        )
    return f"about {_gb(need)} needed, {_gb(free)} free"


def _gb(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _millions(count: int | None) -> str:
    return "(not in safetensors, size unknown)" if count is None else f"{count / 1e6:.1f}M"
