"""Our adapters' arithmetic against peft's own, layer by layer."""

import peft
import pytest
import torch
from torch import nn

from sd3_adrpo.lora_forward import speed_up


def make(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=12, init_lora_weights=False, target_modules=["0"])
    model = peft.inject_adapter_in_model(config, nn.Sequential(nn.Linear(24, 40)).to(dtype), "policy")
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data = parameter.data.float()
    return model


def run(layer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    x = x.clone().requires_grad_()
    y = layer(x)
    y.float().square().sum().backward()
    gradients = [layer.lora_A["policy"].weight.grad, layer.lora_B["policy"].weight.grad]
    layer.zero_grad()
    return y.detach(), x.grad, *gradients


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_equals_peft_with_its_gradients(dtype, tolerance):
    layer, x = make(dtype)[0], torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    theirs = run(layer, x)
    speed_up(layer, "policy")
    assert "forward" in vars(layer)  # it was replaced
    ours = run(layer, x)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).float().norm() <= tolerance * other.float().norm()
    assert ours[2].dtype == torch.float32
    with torch.no_grad():
        by_hand = x.float() @ layer.base_layer.weight.float().T + layer.base_layer.bias.float()
        by_hand += 3 * x.float() @ layer.lora_A["policy"].weight.T @ layer.lora_B["policy"].weight.T
    assert (ours[0].float() - by_hand).norm() <= tolerance * by_hand.norm()


def test_disabled_is_the_base_layer():
    layer, x = make(torch.float32)[0], torch.ones(2, 24)
    speed_up(layer, "policy")
    layer._disable_adapters = True
    assert torch.equal(layer(x), layer.base_layer(x))


def test_other_kinds_stay_as_they_are():
    config = peft.LoraConfig(r=2, target_modules=["0"], use_dora=True)
    layer = peft.inject_adapter_in_model(config, nn.Sequential(nn.Linear(4, 4)), "policy")[0]
    speed_up(layer, "policy")
    assert "forward" not in vars(layer)
