"""The LoRA within the base's weights: the same velocities, and the base comes back bit for bit."""

import pytest
import torch

from sd3_adrpo.config import LoraConfig
from sd3_adrpo.merging import dithered
from sd3_adrpo.models.sd3 import SD3
from sd3_adrpo.policy import Policy
from sd3_adrpo.types import Condition

LORA = LoraConfig(rank=4, alpha=8.0)  # alpha / rank = 2: a forgotten scale would show


@pytest.fixture
def policy(tiny_sd35) -> Policy:
    made = Policy(SD3.load(str(tiny_sd35), max_sequence_length=8), LORA)
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


def test_merged_velocities_equal_the_adapters(policy):
    expected = velocity(policy)
    with policy.reference():
        base = velocity(policy)
    with policy.merged():
        found = velocity(policy)
    assert (expected - base).norm() / base.norm() > 0.01  # the LoRA says something
    assert (found - expected).norm() / expected.norm() < 1e-5


def test_base_and_adapters_come_back_bit_for_bit(policy):
    transformer = policy.model.transformer
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    with pytest.raises(KeyboardInterrupt), policy.merged():
        raise KeyboardInterrupt
    after = transformer.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(velocity(policy), velocity(policy))
    condition = Condition(torch.ones(1, 24, 48), torch.ones(1, 40))
    policy.velocity(torch.ones(1, 16, 8, 8), torch.tensor([0.5]), condition).square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in policy.named_parameters()}
    assert all(gradient.abs().max() > 0 for name, gradient in gradients.items() if "attn.to_out.0" in name)


def test_reference_within_merged_weights_is_refused(policy):
    with policy.merged():
        with pytest.raises(RuntimeError, match="merged"), policy.reference():
            pass
        with pytest.raises(RuntimeError, match="already"), policy.merged():
            pass
    with policy.reference():  # and is to be had again
        pass


def test_in_bfloat16_merging_errs_no_more_than_the_arithmetic(tiny_sd35, policy):
    """Distances to the float32 velocity: of bfloat16 adapters, and of bfloat16 merged weights."""
    exact = velocity(policy)
    low = Policy(SD3.load(str(tiny_sd35), torch.bfloat16, max_sequence_length=8), LORA)
    low.load_state_dict(policy.state_dict())
    adapters = velocity(low).float()
    with low.merged():
        merged = velocity(low).float()
    error, merged_error = ((v - exact).norm() / exact.norm() for v in (adapters, merged))
    assert error < 0.03 and merged_error < 1.5 * error


def test_bfloat16_keeps_what_a_lora_learns_first():
    """Steps of bfloat16 are 2e-4 here; rounding to the nearest kept 7 % of a change of 6e-6."""
    torch.manual_seed(0)
    weight = (0.03 * torch.randn(512, 512)).bfloat16()
    change = 6e-6 * torch.randn(512, 512)
    kept = dithered(weight.float() + change).float() - weight.float()
    assert (kept * change).sum() / change.square().sum() == pytest.approx(1, abs=0.1)
    assert ((weight.float() + change).bfloat16().float() - weight.float()).norm() < 0.5 * kept.norm()
    assert torch.equal(dithered(weight.float()), weight)  # what is exact stays
    step = 2.0 ** ((weight.float().abs() + change.abs()).log2().floor() - 7)  # bfloat16 has 8 bits
    assert ((kept - change).abs() <= step * 1.001).all()
