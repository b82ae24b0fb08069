"""All weights trained: the reference stays, 16 bits lose nothing, and what is exported is what was trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from small import interrupted_after
from test_training import run

from sd3_adrpo.canary import check_learning
from sd3_adrpo.errors import UserError
from sd3_adrpo.export import ExportError, save_transformer, verify_transformer
from sd3_adrpo.flow import seeded_noise
from sd3_adrpo.full import FullPolicy
from sd3_adrpo.models.sd3 import SD3
from sd3_adrpo.objectives.adrpo import Adrpo
from sd3_adrpo.types import Condition

FULL = ["--finetune", "full", "--train.learning_rate", "1e-4"]


def _policy(folder: Path, dtype: torch.dtype = torch.float32) -> FullPolicy:
    return FullPolicy(SD3.load(str(folder), dtype, max_sequence_length=8))


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor, Condition]:
    noisy, text = seeded_noise([1, 2], (16, 8, 8)), seeded_noise([3, 4], (6, 48))
    return noisy, torch.tensor([0.3, 0.8]), Condition(text, seeded_noise([5, 6], (40,)))


def _step(policy: FullPolicy, inputs, rate: float, parts: int = 1) -> None:
    for _ in range(parts):
        (policy.velocity(*inputs).float().square().mean() / parts).backward()
    torch.optim.SGD(policy.parameters(), lr=rate).step()
    policy.updated()
    for parameter in policy.parameters():
        parameter.grad = None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_move_the_policy_and_not_the_reference(tiny_sd35, inputs, dtype):
    policy = _policy(tiny_sd35, dtype)
    with torch.no_grad():
        before = policy.velocity(*inputs)
        with policy.reference():
            assert torch.equal(policy.velocity(*inputs), before)
        _move(policy, inputs)
        assert not torch.equal(policy.velocity(*inputs), before)
        with policy.reference():
            assert torch.equal(policy.velocity(*inputs), before)


def _move(policy: FullPolicy, inputs) -> None:
    with torch.enable_grad():
        _step(policy, inputs, 0.1)


def test_small_steps_add_up_in_the_masters(tiny_sd35, inputs):
    """100 steps of 1e-4 of a weight of 1 make 1 %; bfloat16 alone, whose steps there are 0.8 %, would stay at 1."""
    policy = _policy(tiny_sd35, torch.bfloat16)
    name, master = policy.named_parameters()[0]
    weight = dict(policy.model.transformer.named_parameters())[name]
    with torch.no_grad():
        master.fill_(1.0)
        policy.updated()
        for _ in range(100):
            master.add_(1e-4)
            policy.updated()
    assert weight.dtype == torch.bfloat16 and (weight == torch.tensor(1.01).bfloat16()).all() and weight.max() > 1


def test_gradients_add_up_in_float32(tiny_sd35, inputs):
    policy = _policy(tiny_sd35, torch.bfloat16)
    policy.velocity(*inputs).float().square().mean().backward()
    once = [parameter.grad.clone() for parameter in policy.parameters()]
    policy.velocity(*inputs).float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in policy.parameters())
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(policy.parameters(), once, strict=True))
    assert all(p.grad is None for p in policy.model.transformer.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_averaged_weights_come_and_go(tiny_sd35, inputs, dtype):
    policy = _policy(tiny_sd35, dtype)
    start = [p.detach().clone() for p in policy.parameters()]
    policy.update_old(0.0)
    _step(policy, inputs, 0.1)
    moved = [p.detach().clone() for p in policy.parameters()]
    policy.update_old(0.75)
    with torch.no_grad():
        trained = policy.velocity(*inputs)
        with policy.old():
            averaged = policy.velocity(*inputs)
        assert torch.equal(policy.velocity(*inputs), trained) and not torch.equal(averaged, trained)
    assert all(torch.equal(p, m) for p, m in zip(policy.parameters(), moved, strict=True))
    for old, a, b in zip(policy.old_state(), start, moved, strict=True):
        torch.testing.assert_close(old, 0.75 * a + 0.25 * b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_learning_check_passes_and_leaves_no_trace(tiny_sd35, inputs, dtype):
    policy = _policy(tiny_sd35, dtype)
    before = [p.detach().clone() for p in policy.parameters()]
    with torch.no_grad():
        velocity = policy.velocity(*inputs)
    check_learning(policy, Adrpo(), inputs[2].select(torch.tensor([0])), (16, 8, 8))
    assert all(torch.equal(p, b) and p.grad is None for p, b in zip(policy.parameters(), before, strict=True))
    with torch.no_grad():
        assert torch.equal(policy.velocity(*inputs), velocity)


def test_the_learning_check_finds_weights_that_cannot_move(tiny_sd35, inputs, monkeypatch):
    monkeypatch.setattr(FullPolicy, "updated", lambda self: None)
    policy = _policy(tiny_sd35, torch.bfloat16)
    with pytest.raises(UserError, match="an update does not change the policy's velocity"):
        check_learning(policy, Adrpo(), inputs[2].select(torch.tensor([0])), (16, 8, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_reloads_with_equal_velocities(tiny_sd35, inputs, tmp_path, dtype):
    policy = _policy(tiny_sd35, dtype)
    _step(policy, inputs, 0.1)
    path = save_transformer(policy.model.transformer, tmp_path)
    assert verify_transformer(path, policy.model, policy.velocity) == 0.0
    loaded = SD3Transformer2DModel.from_pretrained(tmp_path, subfolder="transformer", torch_dtype=dtype)
    with torch.no_grad():
        assert torch.equal(policy.model.velocity(*inputs, transformer=loaded), policy.velocity(*inputs))
    _step(policy, inputs, 0.1)
    with pytest.raises(ExportError, match="does not reproduce"):
        verify_transformer(path, policy.model, policy.velocity)


@pytest.mark.parametrize("objective", ["adrpo", "diffusion_nft"])
def test_a_run_resumes_bit_exactly_and_exports(tmp_path, objective):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\ntwo blue squares\na green heart above a pink cross\nan orange diamond\n")
    options = [*FULL, "--prompts", str(prompts), "--objective", objective]
    summary = run(*options, "--output_dir", str(whole))
    assert summary["transformer_difference"] == 0.0 and summary["after"]["w2_drift"] > 0
    with pytest.raises(SystemExit), interrupted_after(3):
        run(*options, "--output_dir", str(parts))
    run(*options, "--resume_from_checkpoint", str(parts))
    first, second = (SD3Transformer2DModel.from_pretrained(f / "transformer").state_dict() for f in (whole, parts))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    again = json.loads((parts / "summary.json").read_text())
    assert again["after"] == summary["after"]
