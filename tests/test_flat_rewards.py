"""What a reward that teaches nothing leaves in the log: a warning, and the answers that held no rating."""

from __future__ import annotations

import types

import pytest
import torch
from accelerate import Accelerator

from sd3_adrpo import cli
from sd3_adrpo.advantages import Advantages
from sd3_adrpo.collect import Collector
from sd3_adrpo.flat_rewards import FlatRewards
from sd3_adrpo.models.sd3 import SD3
from sd3_adrpo.policy import Policy
from sd3_adrpo.prompts import Prompt
from sd3_adrpo.scoring import Scoring
from sd3_adrpo.trainer import Trainer
from sd3_adrpo.types import Rollout

PROMPT = torch.tensor([0, 0, 1, 1])
SIZES = """--rollout.prompts_per_epoch 2 --rollout.samples_per_prompt 2 --rollout.num_inference_steps 1
    --rollout.batch_size 2 --rollout.height 64 --rollout.width 64 --lora.rank 2""".split()


class Rated:
    """Gives every image the same rating, and understands half of the answers."""

    unit, encoder, parse_failures = "rating", "a model", 7  # of an earlier measurement

    def __call__(self, images, prompts):
        self.parse_failures += 1
        return torch.full((len(images),), 5.0)


def _warn(caplog, flat: FlatRewards, **scores: list[float]) -> list[str]:
    caplog.clear()
    found = {f"reward/{name}": torch.tensor(values) for name, values in scores.items()}
    scorer = Scoring(dict.fromkeys(scores, types.SimpleNamespace()))
    rewards = scorer.total(found)
    rollout = Rollout(PROMPT, torch.zeros(4, 1, 1, 1), rewards, scores=found)
    flat.warn(scorer, rollout, Advantages("group")(rewards, PROMPT))
    return [record.getMessage() for record in caplog.records]


def test_a_constant_reward_is_named_once(caplog):
    flat = FlatRewards()
    [message] = _warn(caplog, flat, ocr=[0.0] * 4)
    assert message.startswith("the reward ocr is 0 for all 4 images of an epoch: nothing is learnt. Check that")
    assert _warn(caplog, flat, ocr=[0.0] * 4) == []
    [message] = _warn(caplog, flat, clip=[1.0, 2.0, 3.0, 4.0], jpeg=[7.5] * 4)
    assert "the reward jpeg is 7.5" in message and "adds nothing to the others" in message


def test_a_reward_of_the_prompt_alone_is_flat_too(caplog):
    [message] = _warn(caplog, FlatRewards(), length=[1.0, 1.0, 3.0, 3.0])
    assert "length gives all images of a prompt the same score" in message
    assert _warn(caplog, FlatRewards(), good=[1.0, 1.0 + 1e-4, 3.0, 3.0]) == []


@pytest.fixture
def trainer(tiny_sd3) -> Trainer:
    config = cli.parse([*SIZES, "--lora.target_modules=[attn.to_q]"])
    model = SD3.load(str(tiny_sd3), max_sequence_length=8)
    prompts = [Prompt("a red circle"), Prompt("a cat")]
    policy, scorer = Policy(model, config.lora), Scoring({"vlm": Rated()})
    condition = model.encode([prompt.text for prompt in prompts])
    return Trainer(Collector(config, Accelerator(cpu=True), model, policy, scorer, prompts, condition))


def test_an_epoch_says_both(trainer, caplog):
    trainer._sample(lambda *_: None)
    metrics = trainer._rollout_metrics(trainer.rollout)
    assert metrics["reward/vlm.parse_failures"] == 2  # batches of this epoch; the 7 before do not count
    assert metrics["reward/vlm"] == 5 and metrics["advantage_std"] == 0
    assert [record.getMessage()[:20] for record in caplog.records] == ["the reward vlm is 5 "]
    assert trainer.state_dict()["rollout"]["weighing"]["reward/vlm.parse_failures"] == 2  # a resumed epoch has it
