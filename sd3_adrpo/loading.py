"""A LoRA with the run that made it, and the model under it, for programs that look at one.

torch and diffusers are imported by the functions that need them: what is wrong with the options is said first.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UserError

if TYPE_CHECKING:
    from .config import Config
    from .models.sd3 import SD3

WEIGHTS = "pytorch_lora_weights.safetensors"
ADAPTER = "lora"  # its name in the loaded pipeline


def find_lora(source: str | Path) -> Path:
    """The weight file of a run's folder, of a LoRA's folder, or the file itself; whether it exists is not asked."""
    path = Path(source).expanduser()
    if (path / "lora" / WEIGHTS).is_file():
        return path / "lora" / WEIGHTS
    return path / WEIGHTS if path.is_dir() else path


def present_lora(source: str | Path) -> Path:
    """`find_lora`, once the file is there. UserError; a base model takes minutes to load, so ask before."""
    path = find_lora(source)
    if not path.is_file():
        raise UserError(f"no LoRA at {source}: expected {WEIGHTS} in that folder, or the path of such a file")
    return path


def run_of(source: str | Path) -> Path | None:
    """The folder of the run that a LoRA lies in; None for one from elsewhere."""
    run = find_lora(source).resolve().parent.parent
    return run if (run / "config.yaml").is_file() else None


def load_model(config: Config) -> SD3:
    """The base as the options say, on the GPU where there is one. UserError where it is not there or not that size."""
    import torch
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from .folders import text_cache_folder
    from .models.sd3 import SD3
    from .types import DTYPES

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = DTYPES[config.train.mixed_precision]
    model = SD3.load(config.model, dtype, device, config.rollout.max_sequence_length, text_cache_folder(config))
    model.latent_shape(config.rollout.height, config.rollout.width)
    return model


def load_lora(model: SD3, source: str | Path) -> Path:
    """Loads a LoRA into the model's pipeline as stock diffusers does, once it is sure to fit. ExportError if not."""
    from .export import check_lora

    path = check_lora(source, model.transformer)
    logging.getLogger("diffusers.loaders.lora_base").setLevel("ERROR")  # it warns of text encoders without a LoRA
    model.pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=ADAPTER)
    return path
