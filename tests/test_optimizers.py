"""The 8-bit optimiser learns, is resumed exactly, and says what is missing."""

import copy
import sys

import pytest
import torch
from small import small_trainer

from sd3_adrpo.config import TrainConfig
from sd3_adrpo.errors import UserError
from sd3_adrpo.optimizers import make_optimizer


@pytest.fixture
def uncompiled(monkeypatch):
    """Its step without its torch.compile, which takes longer than the tests."""
    pytest.importorskip("torchao")
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def descend(optimizer: torch.optim.Optimizer, weight: torch.nn.Parameter, goal: torch.Tensor, steps: int) -> float:
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (weight - goal).square().mean()
        loss.backward()
        optimizer.step()
    return loss.item()


def test_eight_bits_descend_as_thirty_two(uncompiled):
    """64 x 64 weights are of a size that is quantised: two moments of a byte, and 16 + 16 scales."""
    goal = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    losses = {}
    for name in ("adamw", "adamw_8bit"):
        weight = torch.nn.Parameter(torch.zeros(64, 64))
        optimizer = make_optimizer([weight], TrainConfig(optimizer=name, learning_rate=0.05, adam_weight_decay=0.0))
        losses[name] = descend(optimizer, weight, goal, 60)
    assert losses["adamw_8bit"] == pytest.approx(losses["adamw"], abs=0.01) and losses["adamw"] < 0.05
    state = optimizer.state[weight]
    assert type(state["exp_avg"]).__name__ == "OptimState8bit" and state["exp_avg"].codes.dtype == torch.uint8
    assert state["exp_avg"].codes.numel() == 64 * 64 and state["exp_avg"].scale.numel() == 16


def test_a_run_is_resumed_exactly(uncompiled, tmp_path):
    """Rank 16 makes some adapters large enough to be quantised; through a file, as a checkpoint."""
    options = ["--train.optimizer", "adamw_8bit", "--lora.rank", "64", "--train.inner_epochs", "1"]
    trainer = small_trainer(tmp_path, *options, "--lora.target_modules", "['attn.to_q']", "--epochs", "2")
    start = copy.deepcopy(trainer.state_dict())
    trainer.run_epoch(lambda *_: None)
    torch.save(trainer.state_dict(), tmp_path / "state.pt")
    metrics, _ = trainer.run_epoch(lambda *_: None)
    assert type(metrics["learning_rate"]) is float
    whole = copy.deepcopy(trainer.state_dict()["lora"])
    assert any("8bit" in type(s["exp_avg"]).__name__ for s in trainer.optimization.optimizer.state.values())
    trainer.load_state_dict(start)
    trainer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert trainer.epoch == 1
    trainer.run_epoch(lambda *_: None)
    assert all(torch.equal(value, whole[name]) for name, value in trainer.state_dict()["lora"].items())
    assert any(not torch.equal(value, start["lora"][name]) for name, value in whole.items())


def test_without_torchao(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(UserError, match=r"adamw_8bit needs torchao.*\.\[lowbit\].*adamw"):
        make_optimizer([torch.nn.Parameter(torch.zeros(1))], TrainConfig(optimizer="adamw_8bit"))
