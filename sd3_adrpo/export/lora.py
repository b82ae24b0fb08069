"""The trained LoRA as a file that stock diffusers and ComfyUI load at full strength, checked by loading it.

Readers disagree about alpha: diffusers takes it from metadata and assumes alpha = rank without, ComfyUI takes it from
`.alpha` tensors, which diffusers refuses. So the file has alpha / rank multiplied into lora_B and says alpha = rank.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import UserError
from ..loading import WEIGHTS, present_lora
from ..models.sd3 import SD3
from ..types import Condition

PREFIX = "transformer."
FACTORS = (".lora_A.weight", ".lora_B.weight")
# stock loading works in the base's type: what it may differ by there is rounding, in units of the largest velocity
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# of the weights' change B A themselves, relative; this one finds a wrong strength in every type
WEIGHT_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


class ExportError(UserError):
    """A LoRA file that would not do what it should: damaged, made for another model, or of the wrong strength."""


def lora_factors(transformer: nn.Module, adapter_name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer name -> (A (r, in), B (out, r)), float32 on the CPU, with alpha / rank in B: the weights change by B A."""
    factors = {}
    for name, module in transformer.named_modules():
        if isinstance(module, LoraLayer) and adapter_name in module.lora_A:
            down = module.lora_A[adapter_name].weight.detach().float().cpu()
            up = module.lora_B[adapter_name].weight.detach().float().cpu() * module.scaling[adapter_name]
            factors[name] = (down, up)
    if not factors:
        raise ExportError(f"the transformer has no LoRA named {adapter_name!r}: there is nothing to export")
    return factors


def save_lora(transformer: nn.Module, folder: str | Path, adapter_name: str = "policy") -> Path:
    """Writes `folder`/pytorch_lora_weights.safetensors, whole or not at all, and returns its path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    factors = lora_factors(transformer, adapter_name)
    layers = {}
    for name, pair in factors.items():
        layers.update({name + suffix: weight.contiguous() for suffix, weight in zip(FACTORS, pair, strict=True)})
    ranks = {len(down) for down, _ in factors.values()}
    if len(ranks) > 1:
        raise ExportError(f"the LoRA has layers of ranks {sorted(ranks)}; only one rank for all can be exported")
    (rank,) = ranks
    # only what every version of peft knows: a new field would stop an older reader
    metadata = {"r": rank, "lora_alpha": rank, "target_modules": sorted(factors)}
    with tempfile.TemporaryDirectory(dir=folder, prefix=".lora-") as partial:
        StableDiffusion3Pipeline.save_lora_weights(
            partial, transformer_lora_layers=layers, transformer_lora_adapter_metadata=metadata
        )
        follow_umask(Path(partial) / WEIGHTS)
        os.replace(Path(partial) / WEIGHTS, folder / WEIGHTS)
    return folder / WEIGHTS


def follow_umask(file: Path) -> None:
    """Gives a file the mode that any new file of the user has: safetensors writes for the owner's eyes alone."""
    twin = file.with_name(f".{file.name}.mode")
    twin.touch()  # the umask itself cannot be read without changing it, for all threads
    file.chmod(twin.stat().st_mode & 0o777)
    twin.unlink()


def stock_pipeline(model: SD3) -> StableDiffusion3Pipeline:
    """A second pipeline over the same base weights, without copying them and without the adapters trained on them."""
    with init_empty_weights():
        transformer = SD3Transformer2DModel.from_config(model.transformer.config)
    state = {
        key.replace(".base_layer.", "."): value
        for named in (model.transformer.named_parameters(), model.transformer.named_buffers())
        for key, value in named  # not state_dict(), which puts gathered weights back into their shards
        if ".lora_" not in key
    }
    transformer.load_state_dict(state, assign=True)  # the same storage; strict, so nothing stays empty
    transformer.requires_grad_(False).eval()
    return StableDiffusion3Pipeline(**{**model.pipeline.components, "transformer": transformer})


@torch.no_grad()
def verify_lora(
    folder: str | Path,
    model: SD3,
    velocity_fn: Callable[[Tensor, Tensor, Condition], Tensor],
    adapter_name: str = "policy",
    batch: int = 2,
    seed: int = 0,
) -> float:
    """Loads the file into a stock pipeline and compares: max |difference| of velocities on random inputs.

    `velocity_fn` is the trained policy's. Allowed are 1e-5 in float32, 1e-2 in float16 and 5e-2 in bfloat16, times the
    largest velocity where that exceeds 1; beyond it, or where the loaded weights differ from the trained ones:
    ExportError. The trained adapters are not touched.
    """
    path = check_lora(folder, model.transformer)
    pipeline = stock_pipeline(model)
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="exported")
    _compare_factors(
        lora_factors(model.transformer, adapter_name), lora_factors(pipeline.transformer, "exported"), model.dtype
    )
    noisy, sigma, condition = _random_inputs(model, batch, seed)
    trained = velocity_fn(noisy, sigma, condition).float()
    loaded = model.velocity(noisy, sigma, condition, transformer=pipeline.transformer).float()
    difference = (trained - loaded).abs().max().item()
    allowed = TOLERANCE[model.dtype] * max(1.0, trained.abs().max().item())
    if not difference <= allowed:  # a NaN must fail too
        raise ExportError(
            f"{path} does not reproduce the trained model: velocities differ by {difference:.2g}, allowed are "
            f"{allowed:.2g}; keep the checkpoint, it holds the trained weights"
        )
    return difference


def _compare_factors(trained: Mapping, loaded: Mapping, dtype: torch.dtype) -> None:
    """ExportError unless both hold the same layers and the same A and B (alpha / rank included)."""
    if trained.keys() != loaded.keys():
        different = sorted(trained.keys() ^ loaded.keys())
        raise ExportError(f"{len(different)} LoRA layers are lost when the file is loaded, e.g. {different[0]}")
    for name in trained:
        for before, after in zip(trained[name], loaded[name], strict=True):
            if not (before - after).abs().max() <= WEIGHT_TOLERANCE[dtype] * before.abs().max():
                raise ExportError(f"the LoRA of {name} changes when the file is loaded: its strength is wrong")


def _random_inputs(model: SD3, batch: int, seed: int) -> tuple[Tensor, Tensor, Condition]:
    """A small latent (at most 32 x 32), sigmas (B,), and 16 tokens of random text."""
    config, generator = model.transformer.config, torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator).to(model.device)

    side = min(32 // config.patch_size, config.pos_embed_max_size) * config.patch_size
    sigma = torch.linspace(0.9, 0.1, batch).to(model.device)
    condition = Condition(normal(16, config.joint_attention_dim), normal(config.pooled_projection_dim))
    return normal(config.in_channels, side, side), sigma, condition


def check_lora(source: str | Path, transformer: nn.Module) -> Path:
    """The weight file in `source` (see `find_lora`), once it is sure to load fully into `transformer`.

    diffusers loads a file of foreign names as nothing, with no more than a log line. Raises ExportError.
    """
    path, shapes = _read_shapes(source)
    _check_shapes(path, shapes, transformer)
    return path


def _read_shapes(source: str | Path) -> tuple[Path, dict[str, tuple[int, ...]]]:
    """The file and its transformer weights' shapes by name without prefix; ExportError for another format."""
    path = present_lora(source)
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ExportError(f"{path} is truncated or no safetensors file ({error}): export or copy it again") from error
    ours = {key.removeprefix(PREFIX): shape for key, shape in shapes.items() if key.startswith(PREFIX)}
    foreign = [key for key in shapes if not key.startswith((PREFIX, "text_encoder"))]
    if foreign or not ours:
        example = f", e.g. {foreign[0]}" if foreign else ""
        raise ExportError(
            f"{path} is not in diffusers' format for SD3: all names must start with {PREFIX!r}, {len(ours)} of "
            f"{len(shapes)} do{example}. Files of kohya, ComfyUI or peft itself need converting first"
        )
    return path, ours


def read_lora(source: str | Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer name -> (A (r, in), B (out, r)) of a file in diffusers' format, alpha / rank in B, as stored otherwise.

    The base is not needed. ExportError for what a plain LoRA of the transformer has not: half a pair, weights of text
    encoders, a strength or a kind (DoRA, rsLoRA) that differs between layers or readers.
    """
    path, shapes = _read_shapes(source)
    names = sorted({key.rpartition(".lora_")[0] or key for key in shapes})
    odd = shapes.keys() ^ {name + factor for name in names for factor in FACTORS}
    with safe_open(path, framework="pt") as file:
        odd |= {key for key in file.keys() if not key.startswith(PREFIX)}
        if odd:
            raise ExportError(f"{path} is not a plain LoRA of the transformer: see {sorted(odd)[0]}")
        strength = _strength(path, json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}")))
        pairs = {name: [file.get_tensor(PREFIX + name + factor) for factor in FACTORS] for name in names}
    return {name: (down, up if strength == 1 else up * strength) for name, (down, up) in pairs.items()}


def _strength(path: Path, metadata: Mapping) -> float:
    """alpha / rank; diffusers takes alpha = rank where the file says nothing."""
    options = {key.removeprefix(PREFIX): value for key, value in metadata.items()}
    special = [key for key in ("rank_pattern", "alpha_pattern", "use_dora", "use_rslora") if options.get(key)]
    if special:
        raise ExportError(f"{path} uses {special[0]}; only a LoRA of one rank and one alpha can be converted")
    return options["lora_alpha"] / options["r"] if {"lora_alpha", "r"} <= options.keys() else 1.0


def _check_shapes(path: Path, shapes: Mapping[str, tuple[int, ...]], transformer: nn.Module) -> None:
    modules = {name.replace(".base_layer", ""): module for name, module in transformer.named_modules()}
    names = sorted({key.rpartition(".lora_")[0] or key for key in shapes})
    problems = [f"{key} is no lora_A or lora_B weight" for key in shapes if not key.endswith(FACTORS)]
    for name in names:
        weight = getattr(modules.get(name), "weight", None)
        down, up = (shapes.get(name + factor) for factor in FACTORS)
        if weight is None:
            problems.append(f"{name} does not exist")
        elif down is None or up is None:
            problems.append(f"{name} has one LoRA factor of two")
        elif down[1:] != tuple(weight.shape[1:]) or up[:2] != (len(weight), down[0]):
            problems.append(f"{name} is {tuple(weight.shape)} here and {(up[0], *down[1:])} there")
    if problems:
        raise ExportError(
            f"{path} was made for another model: {len(problems)} misfits in its {len(names)} layers, "
            f"e.g. {problems[0]}. Give the model that it was trained on"
        )
