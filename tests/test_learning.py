"""Objectives raise the reward of the built-in world on two prompts, the same noise before and after.

RAFT and ORW-CFM-W2 only weigh samples up, so they also learn what all samples have in common: flow matching on its own
samples costs so small a model more CLIP reward than selection earns (docs/results/main). They are asked for smaller
JPEG files, which that does not cost.
"""

import json
from pathlib import Path

import pytest
import torch

from sd3_adrpo import cli, plan
from sd3_adrpo.run import Run

OPTIONS = """--config study --rollout.prompts_per_epoch 2 --rollout.samples_per_prompt 128 --epochs 2
    --evaluation_epochs 0 --eval.samples_per_prompt 64 --objective.advantage group_std""".split()
CONTRASTS = {
    "adrpo": "",
    "awm": "",
    "diffusion_nft": "--objective.advantage_clip 1",
    "dpo": "--objective.pairs 64 --objective.beta 30",
    "flow_grpo": "--objective.clip_range 1e-3",
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """Holds the prompts, and what all runs have in common."""
    folder = tmp_path_factory.mktemp("learning")
    (folder / "prompts.txt").write_text("a red circle left of a blue square\nthree yellow stars\n")
    return folder


def gains(shared: Path, folder: Path, objective: str, options: str) -> torch.Tensor:
    """Differences of reward (128,), image by image at the same noise."""
    prompts = ["--prompts", str(shared / "prompts.txt"), "--test_prompts", str(shared / "prompts.txt")]
    where = ["--base_cache", str(shared / "base"), "--output_dir", str(folder)]
    config = cli.parse([*OPTIONS, *prompts, *where, "--objective", objective, *options.split()])
    Run(config, plan.check(config))()
    kept = json.loads((folder / "samples" / "samples.json").read_text())
    return torch.tensor(kept["after"]["reward"]) - torch.tensor(kept["before"]["reward"])


def stderrs(difference: torch.Tensor) -> float:
    return (difference.mean() / difference.std() * len(difference) ** 0.5).item()


@pytest.mark.parametrize("objective", CONTRASTS)
def test_contrasts_raise_the_reward(shared, tmp_path, objective):
    gain = gains(shared, tmp_path / "run", objective, CONTRASTS[objective])
    assert gain.mean() > 1 and stderrs(gain) > 2, (gain.mean(), stderrs(gain))


WEIGHTS = {
    "raft": "--objective.keep 8 --train.inner_epochs 4 --train.learning_rate 2e-4",
    "orw_cfm_w2": "--objective.alpha 1 --objective.tau 2",
}


@pytest.mark.parametrize("objective", WEIGHTS)
def test_weighing_up_raises_a_reward_that_samples_of_oneself_do_not_lower(shared, tmp_path, objective):
    gain = gains(shared, tmp_path / "run", objective, f"--reward jpeg {WEIGHTS[objective]}")  # kB
    assert gain.mean() > 0.03 and stderrs(gain) > 5, (gain.mean(), stderrs(gain))
