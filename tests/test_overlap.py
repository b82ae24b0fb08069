"""Work beside the making of items: order, errors and stops; and a reward that runs while the next batch is sampled."""

import threading

import pytest
import torch
from small import small_trainer

from sd3_adrpo.errors import RewardError
from sd3_adrpo.overlap import worked_on
from sd3_adrpo.trainer import Interrupted

PATIENCE = 20.0  # seconds; only a test that fails waits for them


@pytest.mark.parametrize("beside", [True, False])
def test_results_come_in_order(beside):
    assert list(worked_on(range(5), lambda x: x * x, beside)) == [0, 1, 4, 9, 16]
    assert list(worked_on([], str, beside)) == []


def test_the_next_item_is_made_meanwhile_and_only_that():
    """The work on each item but the last ends only when the next one is there; two items are alive at most."""
    made = [threading.Event() for _ in range(4)]
    seen: list[tuple[int, int]] = []

    def items():
        for number, event in enumerate(made):
            event.set()
            yield number

    def work(number: int) -> bool:
        seen.append((number, sum(event.is_set() for event in made)))
        return number == 3 or made[number + 1].wait(PATIENCE)

    results = []
    for result in worked_on(items(), work):
        results.append(result)
        assert sum(event.is_set() for event in made) <= len(results) + 1
    assert results == [True] * 4 and [number for number, _ in seen] == [0, 1, 2, 3]


@pytest.mark.parametrize("beside", [True, False])
def test_a_stop_hands_out_what_is_due(beside):
    def items():
        yield 1
        yield 2
        raise Interrupted

    results = []
    with pytest.raises(Interrupted):
        for result in worked_on(items(), lambda x: x, beside):
            results.append(result)
    assert results == [1, 2]


@pytest.mark.parametrize("beside", [True, False])
def test_an_error_of_the_work_comes_in_its_place(beside):
    worked = []

    def work(number: int) -> int:
        worked.append(number)
        if number == 2:
            raise RewardError("two")
        return number

    results = []
    with pytest.raises(RewardError, match="two"):
        for result in worked_on(range(9), work, beside):
            results.append(result)
    assert results == [0, 1] and worked == [0, 1, 2]  # nothing after it is worked on
    assert not any(thread.name.startswith("beside") for thread in threading.enumerate())


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """Two batches of 8 an epoch."""
    return small_trainer(tmp_path_factory.mktemp("overlap"), "--reward", "jpeg")


def test_scoring_waits_for_nothing_but_the_next_batch(trainer, monkeypatch):
    """The reward of batch 1 returns once batch 2 is being sampled: one after the other, it would wait for ever."""
    second, latents, scorer = threading.Event(), trainer.collector._latents, trainer.scorer.scorers["reward/jpeg"]
    batches, met = [], []

    def sampling(prompt, seeds):
        batches.append(len(prompt))
        if len(batches) == 2:
            second.set()
        return latents(prompt, seeds)

    def reward(images, prompts):
        met.append(second.wait(PATIENCE))
        return scorer(images, prompts)

    monkeypatch.setattr(trainer.collector, "_latents", sampling)
    monkeypatch.setitem(trainer.scorer.scorers, "reward/jpeg", reward)
    trainer._sample(lambda *_: None)
    assert batches == [8, 8] and met == [True, True]


def test_the_samples_are_the_same(trainer, monkeypatch):
    kept = []
    for beside in (True, False):
        monkeypatch.setattr(trainer.config.rollout, "overlap_scoring", beside)
        told = []
        trainer._sample(lambda *what, told=told: told.append(what))
        assert told == [("sampling", 8, 16), ("sampling", 16, 16)]
        kept.append(trainer.rollout)
    assert torch.equal(kept[0].rewards, kept[1].rewards) and torch.equal(kept[0].clean, kept[1].clean)
    assert torch.equal(kept[0].images, kept[1].images) and kept[0].rewards.std() > 0


def test_a_stop_after_the_first_batch_keeps_it(trainer, monkeypatch):
    trainer._sample(lambda *_: None)
    whole, checks = trainer.rollout, []

    def stop():
        checks.append(1)
        if len(checks) == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        trainer.collector(trainer.epoch, lambda *_: None, stop)
    assert [len(part.prompt) for part in trainer.collector.done] == [8]
    again = trainer.collector(trainer.epoch, lambda *_: None, lambda: None)  # goes on with the second
    assert torch.equal(again.rewards, whole.rewards) and trainer.collector.done == []
