"""What a run needs of this computer, in words: memory, time and disk. `--dry_run` prints it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from .config import Config
from .cost import FRACTION_OF_PEAK, epoch_flops, measuring_flops, memory, tokens_of
from .errors import UserError
from .folders import text_cache_folder
from .machine import installed_memory, matrix_speed
from .model_files import ModelFiles
from .prompts import Prompt

KEPT_CHECKPOINTS = 3  # two that stay and the one being written
DURATIONS = (("days", 86400), ("h", 3600), ("min", 60))


def memory_text(config: Config, model: ModelFiles, lora: int) -> str:
    """Rough, and not yet compared with a GPU: cost.py."""
    if not model.config:
        return "not known before the model is here"
    need = memory(config, model, lora)
    name, total = installed_memory()
    too_much = total and need.peak > total
    return (
        f"{gb(need.encoding)} while prompts are encoded; {gb(need.frozen)} frozen weights, {gb(need.lora)} "
        f"trained weights with optimiser, then {gb(need.sampling)} to sample or {gb(need.training)} of activations "
        f"to train (rough figures), and the reward's model besides; {name} has {gb(total)}"
        + (": THIS MAY NOT FIT; lower train.batch_size, or set train.gradient_checkpointing" if too_much else "")
    )


def time_text(config: Config, model: ModelFiles, test: Sequence[Prompt]) -> str:
    """Seconds from operations, at the speed of a matrix product measured here and the share of it that we expect."""
    if not model.config or os.environ.get("RANK", "0") != "0":  # one process measures, and prints
        return "not known before the model is here"
    import torch

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    fraction = FRACTION_OF_PEAK[kind][config.train.mixed_precision]
    speed = fraction * matrix_speed(kind, config.train.mixed_precision)
    epoch, measuring = epoch_flops(config, model), measuring_flops(config, model, len(test))
    return (
        f"about {_duration(epoch / speed)} per epoch and {_duration(measuring / speed)} per measurement on one "
        f"process, the reward besides: {epoch / 1e12:.3g} and {measuring / 1e12:.3g} TFLOP, at {fraction:.0%} of the "
        "speed of matrix products here"
    )


def disk_text(config: Config, model: ModelFiles, lora: int, output: Path | None, prompts: Sequence[Prompt]) -> str:
    """12 bytes per LoRA weight in a checkpoint (value and Adam's moments), with the epoch's images and latents."""
    rollout = config.rollout
    pixels = rollout.prompts_per_epoch * rollout.samples_per_prompt * rollout.height * rollout.width
    checkpoint = 12 * lora + pixels * 3 + pixels // 64 * 16 * 4
    need = KEPT_CHECKPOINTS * checkpoint + 4 * lora + 20 * 2**20  # and pictures and logs
    folder = (output or Path("runs")).absolute()
    free = _free(folder)
    if need > free:
        raise UserError(
            f"the run needs about {gb(need)} in {folder}, where {gb(free)} are free: make room, or give an "
            "--output_dir on another disk"
        )
    return f"about {gb(need)} needed, {gb(free)} free{_embeddings(config, model, prompts)}"


def _embeddings(config: Config, model: ModelFiles, prompts: Sequence[Prompt]) -> str:
    """What the prompts take in the cache; those of earlier runs are there already."""
    folder = text_cache_folder(config)
    if folder is None or not model.config:
        return ""
    item = 4 if config.train.mixed_precision == "no" else 2
    row = tokens_of(config, model).text * model.config["joint_attention_dim"] + model.config["pooled_projection_dim"]
    need = item * row * len({prompt.text for prompt in prompts})
    free = _free(folder)
    too_much = ": THIS MAY NOT FIT; give another --text_cache" if need > free else ""
    return f"; {gb(need)} of prompt embeddings go to {folder}, where {gb(free)} are free{too_much}"


def _free(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def gb(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    for unit, size in DURATIONS:
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
