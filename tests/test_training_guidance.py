"""Guided training: the formula, where gradients go, how many calls it takes; and that it is off unless asked for."""

import pytest
import torch
from small import small_trainer

from sd3_adrpo import cli
from sd3_adrpo.models.sd3 import SD3
from sd3_adrpo.rollout import training_velocity
from sd3_adrpo.types import Batch, Condition


def condition(value: float) -> Condition:
    return Condition(torch.zeros(2, 1, 1), torch.full((2, 1), value))


def batch(negative: Condition | None) -> Batch:
    zeros = torch.zeros(2, 1, 1, 1)
    return Batch(torch.zeros(2), torch.full((2,), 0.5), zeros, zeros, None, condition(3.0), negative)


def test_by_hand():
    """A model v = w c, with w = 1, c = 3 and negative 1: v = 1 + 2 (3 - 1) = 5; dv/dw through the condition: 2 x 3."""
    weight, calls = torch.ones((), requires_grad=True), []

    def velocity(noisy, sigma, given):
        calls.append(len(noisy))
        return weight * given.pooled[:, :, None, None].expand_as(noisy)

    guided = training_velocity(velocity, batch(condition(1.0)), 2.0)
    assert guided.flatten().tolist() == [5.0, 5.0] and calls == [2, 2]
    guided.mean().backward()
    assert weight.grad == 6.0
    calls.clear()
    with torch.no_grad():
        assert training_velocity(velocity, batch(condition(1.0)), 2.0).flatten().tolist() == [5.0, 5.0]
    assert calls == [4]
    calls.clear()
    assert training_velocity(velocity, batch(None), 1.0).flatten().tolist() == [3.0, 3.0] and calls == [2]


def calls_of(trainer, monkeypatch) -> list[tuple[int, bool]]:
    """(samples, with gradient) of every transformer call of a pass, and its batches' references."""
    calls, velocity = [], SD3.velocity

    def counted(self, noisy, sigma, given, **options):
        calls.append((len(noisy), torch.is_grad_enabled()))
        return velocity(self, noisy, sigma, given, **options)

    monkeypatch.setattr(SD3, "velocity", counted)
    trainer._update_pass(lambda *_: None)
    monkeypatch.setattr(SD3, "velocity", velocity)
    return calls


def test_in_the_loop(tmp_path, monkeypatch):
    """4 frozen passes of 8 draws and 4 batches of 8; guided frozen passes are of 16, each batch has one more, of 8."""
    options = ["--rollout.guidance_scale", "1", "--train.guidance_scale", "3", "--objective.refresh_epochs", "0"]
    trainer = small_trainer(tmp_path, *options)
    trainer._sample(lambda *_: None)
    assert sorted(calls_of(trainer, monkeypatch)) == [(8, False)] * 4 + [(8, True)] * 4 + [(16, False)] * 4
    trainer.draws = None
    draws = trainer._draw(torch.arange(4)[:, None])
    trainer._freeze(draws)
    one, model = trainer._batch(draws, torch.arange(4)), trainer.model
    with torch.no_grad(), trainer.policy.reference():
        positive = model.velocity(one.noisy, one.sigma, one.condition)
        negative = model.velocity(one.noisy, one.sigma, model_negative(trainer, 8))
    torch.testing.assert_close(one.reference, negative + 3 * (positive - negative), atol=2e-5, rtol=1e-5)
    assert (positive - negative).abs().max() > 1e-2
    trainer.config.train.guidance_scale, trainer.update = 1.0, 0
    assert sorted(calls_of(trainer, monkeypatch)) == [(8, False)] * 4 + [(8, True)] * 4


def model_negative(trainer, rows: int) -> Condition:
    return trainer.negative.select(torch.zeros(rows, dtype=torch.long))


def test_off_by_default_and_on_its_own():
    assert cli.parse([]).train.guidance_scale == 1.0
    assert cli.parse(["--rollout.guidance_scale", "4"]).train.guidance_scale == 1.0


def test_paths_cannot_be_guided(tmp_path):
    from sd3_adrpo.errors import UserError

    with pytest.raises(UserError, match="train.guidance_scale"):
        small_trainer(tmp_path, "--objective", "flow_grpo", "--train.guidance_scale", "2")
