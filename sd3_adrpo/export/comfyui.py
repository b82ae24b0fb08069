"""The LoRA under the original SD3 key names, as ComfyUI's loader reads it.

diffusers renamed and split the layers of the original checkpoint: there, q, k and v are one layer, and the halves of
`norm_out` (and of the last block's `norm1_context`) come as (shift, scale) instead of (scale, shift). The names are
those of ComfyUI's `comfy/utils.py` (`mmdit_to_diffusers`) and of diffusers'
`convert_sd3_transformer_checkpoint_to_diffusers`; of the many prefixes that `comfy/lora.py` knows, the one used here,
`diffusion_model.`, is the generic one, with the original name as it is.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .lora import ExportError, follow_umask, read_lora

OUTER = {
    "context_embedder": "context_embedder",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
BLOCK = {
    "attn.to_out.0": "x_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
}
QKV = {  # the three parts of each joint layer, in the order of its rows
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
PART = {name: (joint, row) for joint, names in QKV.items() for row, name in enumerate(names)}


def to_comfyui(factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """diffusers' layer name -> (A (r, in), B (out, r)) to ComfyUI's keys: lora_down, lora_up and alpha of each layer.

    alpha is the rank, so the strength 1 is B A for every reader. ExportError for a layer that SD3 has not.
    """
    layers: dict[str, tuple[Tensor, Tensor]] = {}
    joint: dict[str, dict[int, tuple[Tensor, Tensor]]] = defaultdict(dict)
    for name, (down, up) in factors.items():
        block = re.match(r"transformer_blocks\.(\d+)\.(.+)", name)
        prefix, inner = (f"joint_blocks.{block[1]}.", block[2]) if block else ("", name)
        if block and inner in PART:
            target, row = PART[inner]
            joint[prefix + target][row] = (down, up)
        elif (target := (BLOCK if block else OUTER).get(inner)) is None:
            raise ExportError(f"{name} has no counterpart in the original SD3: ComfyUI could not load it")
        else:
            layers[prefix + target] = (down, _shift_first(up) if _scale_first(inner, down, up) else up)
    layers |= {name: _join(parts) for name, parts in joint.items()}
    file = {}
    for name, (down, up) in sorted(layers.items()):
        key = f"diffusion_model.{name}"
        file[f"{key}.lora_down.weight"], file[f"{key}.lora_up.weight"] = down.contiguous(), up.contiguous()
        file[f"{key}.alpha"] = torch.tensor(float(len(down)))
    return file


def _scale_first(name: str, down: Tensor, up: Tensor) -> bool:
    """Whether diffusers holds this layer as (scale, shift): its final norm, and the text's norm in the last block.

    That one has two rows of values per channel, where the text's norms in other blocks have six.
    """
    return name == "norm_out.linear" or (name == "norm1_context.linear" and len(up) == 2 * down.shape[1])


def _shift_first(up: Tensor) -> Tensor:
    scale, shift = up.chunk(2)
    return torch.cat([shift, scale])


def _join(parts: Mapping[int, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """q, k and v, of which some may be missing, as one layer: A stacked, B in a block of its own for each.

    [dW_q]   [B_q  0   0 ] [A_q]
    [dW_k] = [ 0  B_k  0 ] [A_k]
    [dW_v]   [ 0   0  B_v] [A_v]
    """
    downs, ups = [], []
    for row, (down, up) in sorted(parts.items()):
        column = up.new_zeros(3, *up.shape)
        column[row] = up
        downs.append(down)
        ups.append(column.flatten(0, 1))
    return torch.cat(downs), torch.cat(ups, dim=1)


def save_comfyui(lora: str | Path, file: str | Path) -> Path:
    """Converts an exported LoRA; `file` is written whole or not at all. ExportError where it exists already."""
    file = Path(file)
    if file.suffix != ".safetensors":
        raise ExportError(f"{file} must end in .safetensors, or ComfyUI does not list it")
    if file.exists():
        raise ExportError(f"{file} exists already: give another name, or move it away")
    converted = to_comfyui(read_lora(lora))
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    save_file(converted, partial, metadata={"format": "pt"})
    follow_umask(partial)
    return partial.replace(file)
