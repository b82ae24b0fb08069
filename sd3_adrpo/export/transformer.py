"""The trained transformer of `--finetune full` as a folder that stock diffusers loads, checked by loading it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from ..models.sd3 import SD3
from ..types import Condition
from .lora import ExportError, _random_inputs

NAME = "transformer"  # of the folder; a pipeline's own, so that it can take its place


def save_transformer(transformer: nn.Module, folder: str | Path) -> Path:
    """Writes `folder`/transformer, whole or not at all, in the type that the model computes in; returns its path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with init_empty_weights():
        stock = SD3Transformer2DModel.from_config(transformer.config)
    tensors = {**dict(transformer.named_parameters()), **dict(transformer.named_buffers())}
    stock.load_state_dict({name: value.detach() for name, value in tensors.items()}, assign=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{NAME}-") as partial:
        stock.save_pretrained(Path(partial) / NAME)
        shutil.rmtree(folder / NAME, ignore_errors=True)
        os.replace(Path(partial) / NAME, folder / NAME)
    return folder / NAME


@torch.no_grad()
def verify_transformer(
    path: Path, model: SD3, velocity_fn: Callable[[Tensor, Tensor, Condition], Tensor], batch: int = 2, seed: int = 0
) -> float:
    """Loads the folder as diffusers does: max |difference| of velocities on random inputs, 0 but for a broken file.

    ExportError where it is not within 1e-5. A third transformer is on the device meanwhile.
    """
    loaded = SD3Transformer2DModel.from_pretrained(path, torch_dtype=model.dtype).to(model.device).eval()
    inputs = _random_inputs(model, batch, seed)
    unlike = velocity_fn(*inputs).float() - model.velocity(*inputs, transformer=loaded).float()
    difference = unlike.abs().max().item()
    if not difference <= 1e-5:  # a NaN must fail too
        raise ExportError(
            f"{path} does not reproduce the trained model: velocities differ by {difference:.2g}; keep the checkpoint, "
            "it holds the trained weights"
        )
    return difference
