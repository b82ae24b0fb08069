"""One draw for all passes of an epoch: the same noise, half of the frozen passes, and a resume that knows it."""

import copy

import pytest
import torch
from small import small_trainer

from sd3_adrpo.policy import Policy
from sd3_adrpo.trainer import Interrupted, Trainer


@pytest.fixture(scope="module")
def trainer(tmp_path_factory) -> Trainer:
    """The penalty's reference is the base."""
    return small_trainer(tmp_path_factory.mktemp("reuse"), "--objective.refresh_epochs", "0")


@pytest.fixture
def fresh(trainer, monkeypatch):
    """The trainer as it was at the start."""
    start = copy.deepcopy(trainer.state_dict())
    monkeypatch.setattr(trainer.config.train, "reuse_noise", True)
    yield trainer
    trainer.load_state_dict(start)


def watched_epoch(trainer: Trainer, monkeypatch) -> tuple[list[dict], int]:
    """Every batch of an epoch's updates, and how often the reference was asked for."""
    batches, frozen = [], []
    loss, reference = type(trainer.objective).loss, Policy.reference

    def kept(self, velocity, batch):
        batches.append({name: getattr(batch, name).clone() for name in ("sigma", "noisy", "reference", "advantage")})
        return loss(self, velocity, batch)

    monkeypatch.setattr(type(trainer.objective), "loss", kept)
    monkeypatch.setattr(Policy, "reference", lambda self: frozen.append(1) or reference(self))
    trainer.run_epoch(lambda *_: None)
    assert trainer.draws is None  # nothing of it goes on into the next epoch
    return batches, len(frozen)


def test_the_second_pass_sees_the_draws_of_the_first(fresh, monkeypatch):
    """The reference is asked for once."""
    batches, frozen = watched_epoch(fresh, monkeypatch)
    assert len(batches) == 8 and frozen == 1
    for first, second in zip(batches[:4], batches[4:], strict=True):
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_otherwise_noise_is_fresh(fresh, monkeypatch):
    monkeypatch.setattr(fresh.config.train, "reuse_noise", False)
    batches, frozen = watched_epoch(fresh, monkeypatch)
    assert len(batches) == 8 and frozen == 2
    first, second = (torch.cat([b["sigma"] for b in part]).sort().values for part in (batches[:4], batches[4:]))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("updates", [1, 3])
def test_resume_is_bit_exact(fresh, monkeypatch, updates):
    """Stopped in the first and in the second pass, whose draws have to be made again."""
    start, step, done = copy.deepcopy(fresh.state_dict()), fresh.optimization.step, []
    fresh.run_epoch(lambda *_: None)
    whole = copy.deepcopy(fresh.state_dict())
    fresh.load_state_dict(start)

    def interrupted():
        done.append(1)
        fresh.stopped = len(done) == updates
        return step()

    monkeypatch.setattr(fresh.optimization, "step", interrupted)
    with pytest.raises(Interrupted):
        fresh.run_epoch(lambda *_: None)
    saved, fresh.stopped = copy.deepcopy(fresh.state_dict()), False
    assert (fresh.inner, fresh.update) == divmod(updates, 2)
    fresh.load_state_dict(start)  # forgets
    fresh.load_state_dict(saved)
    assert fresh.draws is None
    fresh.run_epoch(lambda *_: None)
    assert all(torch.equal(value, whole["lora"][name]) for name, value in fresh.state_dict()["lora"].items())
