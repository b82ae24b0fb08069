"""The adapters' part of a layer, x A^T B^T alpha / r, in the model's own type and in two matrix products.

peft computes it in the adapters' float32: it casts the layer's input up, multiplies without tensor cores, and scales,
adds and casts down in passes of their own. Here the small matrices are cast down instead, as autocast would, and scale
and sum ride along in the second product. The adapters and their gradients stay float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor


def speed_up(layer: BaseTunerLayer, adapter: str) -> None:
    """Replaces the `forward` of a plain LoRA linear layer that has this one adapter; leaves other kinds alone."""
    if not isinstance(layer, Linear) or layer.use_dora.get(adapter) or layer.lora_bias.get(adapter):
        return
    down, up, scaling = layer.lora_A[adapter], layer.lora_B[adapter], layer.scaling[adapter]

    def forward(x: Tensor) -> Tensor:
        base = layer.base_layer(x)
        if layer._disable_adapters:
            return base
        inner = F.linear(x, down.weight.to(x.dtype)).flatten(0, -2)
        return torch.addmm(base.flatten(0, -2), inner, up.weight.to(x.dtype).t(), alpha=scaling).view_as(base)

    layer.forward = forward
