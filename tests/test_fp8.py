"""Float8 rollouts: the products against their own definition, and how far they move a velocity."""

import pytest
import torch
from torch import nn

from sd3_adrpo import cli, fp8
from sd3_adrpo.config import LoraConfig
from sd3_adrpo.errors import UserError
from sd3_adrpo.models.sd3 import SD3
from sd3_adrpo.policy import Policy
from sd3_adrpo.types import Condition


class Transformer(nn.Module):
    def __init__(self, *layers: nn.Linear) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList([nn.Sequential(*layers)])

    def forward(self, x):
        return self.transformer_blocks[0](x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_by_hand(dtype):
    """Every value is a small integer times a power of two times its row's maximum / 448: e4m3 holds them exactly."""
    weight = torch.zeros(16, 16, dtype=dtype)
    weight[0, :2] = torch.tensor([448.0, 3.0])
    weight[1, :2] = torch.tensor([-0.5, 7.0 / 64])  # scale 0.5 / 448: 448 and 98 -> 96, as e4m3 has 3 bits
    layer = nn.Linear(16, 16).to(dtype)
    layer.weight.data, layer.bias.data = weight, torch.arange(16).to(dtype)
    x = torch.zeros(2, 1, 16, dtype=dtype)
    x[0, 0, 0], x[1, 0, 1] = 2.0, 448.0  # one per token: both rounded exactly
    with torch.no_grad(), fp8.in_float8(Transformer(layer)):
        y = layer(x)
    assert y.shape == (2, 1, 16) and y.dtype == dtype
    torch.testing.assert_close(y[0, 0, :3].float(), torch.tensor([896.0, 0.0, 2.0]))
    torch.testing.assert_close(y[1, 0, :3].float(), torch.tensor([1344.0, 1 + 448 * 96 * 0.5 / 448, 2.0]))


def test_rounding_is_relative_to_each_row():
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 64)[:, None]
    low, scale = fp8.rounded(x)
    error = (low.float() * scale - x).abs()
    assert scale.shape == (64, 1) and torch.isfinite(low.float()).all()
    assert (error <= torch.maximum(x.abs() / 16, x.abs().amax(1, keepdim=True) / 448 * 2**-9)).all()  # half a last bit
    assert torch.equal(fp8.rounded(torch.zeros(2, 16))[0].float(), torch.zeros(2, 16))


def test_largest_value_of_a_bfloat16_row_is_no_nan():
    low, _ = fp8.rounded(torch.linspace(0.5, 2, 4096, dtype=torch.bfloat16)[:, None])
    assert torch.isfinite(low.float()).all()


@pytest.fixture
def policy(tiny_sd35) -> Policy:
    made = Policy(SD3.load(str(tiny_sd35), max_sequence_length=8), LoraConfig(rank=4, alpha=8.0))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return made


def velocity(policy: Policy) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    noisy = torch.randn(3, 16, 8, 8, generator=generator)
    condition = Condition(torch.randn(3, 24, 48, generator=generator), torch.randn(3, 40, generator=generator))
    return policy.velocity(noisy, torch.tensor([0.9, 0.5, 0.1]), condition).detach()


def test_velocities_of_merged_weights_move_by_the_rounding(policy):
    exact = velocity(policy)
    with policy.reference():
        base = velocity(policy)
    with policy.merged(), fp8.in_float8(policy.model.transformer):
        found = velocity(policy)
    error = (found - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.05  # it did something; e4m3 has 3 bits of mantissa, 2 to 4 % per product
    assert error < 0.5 * (found - base).norm() / base.norm()  # the merged weights were rounded, not the base's
    assert torch.equal(velocity(policy), exact)  # and nothing stays


def test_modulation_and_adapters_keep_their_type(policy):
    blocks = policy.model.transformer.transformer_blocks
    with fp8.in_float8(policy.model.transformer):
        patched = {
            name for name, layer in blocks.named_modules() if isinstance(layer, nn.Linear) and "forward" in vars(layer)
        }
    assert any("attn.to_q.base_layer" in name for name in patched) and any("ff.net.2" in name for name in patched)
    assert not any("norm" in name or "lora_" in name for name in patched)


def test_compiled_blocks_notice(policy):
    from sd3_adrpo.compiling import compile_blocks

    torch._dynamo.reset()
    exact = velocity(policy)
    with policy.merged(), fp8.in_float8(policy.model.transformer):
        expected = velocity(policy)
    assert compile_blocks(policy, Condition(torch.ones(1, 24, 48), torch.ones(1, 40)), (16, 8, 8), 3, 3, True, "eager")
    with policy.merged(), fp8.in_float8(policy.model.transformer):
        torch.testing.assert_close(velocity(policy), expected)
    torch.testing.assert_close(velocity(policy), exact, atol=1e-6, rtol=1e-5)


def test_what_it_does_not_go_with(monkeypatch):
    for precision in ("fp16", "no"):
        config = cli.parse(f"--rollout.fp8 true --train.mixed_precision {precision}".split())
        with pytest.raises(UserError, match=f"mixed_precision bf16, not {precision}"):
            fp8.check(config)
    config = cli.parse("--rollout.fp8 true --train.mixed_precision bf16 --objective flow_grpo".split())
    with pytest.raises(UserError, match=r"flow_grpo.*leave it out"):
        fp8.check(config)
    config = cli.parse("--rollout.fp8 true --train.mixed_precision bf16".split())
    fp8.check(config)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A100")
    with pytest.raises(UserError, match=r"8\.9.*A100 has 8\.0"):
        fp8.check(config)
