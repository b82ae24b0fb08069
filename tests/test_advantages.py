"""Advantages by hand."""

import pytest
import torch

from sd3_adrpo.advantages import Advantages

REWARDS = torch.tensor([1.0, 3.0, 10.0, 14.0])
PROMPT = torch.tensor([7, 7, 2, 2])


def test_batch():
    # mean 7, deviations -6, -4, 3, 7, variance (36 + 16 + 9 + 49) / 4 = 27.5
    expected = torch.tensor([-6.0, -4.0, 3.0, 7.0]) / 27.5**0.5
    torch.testing.assert_close(Advantages("batch")(REWARDS, PROMPT), expected)


def test_group():
    # deviations within the prompts: -1, 1, -2, 2, of variance 2.5
    expected = torch.tensor([-1.0, 1.0, -2.0, 2.0]) / 2.5**0.5
    torch.testing.assert_close(Advantages("group")(REWARDS, PROMPT), expected)


def test_group_std():
    torch.testing.assert_close(Advantages("group_std")(REWARDS, PROMPT), torch.tensor([-1.0, 1.0, -1.0, 1.0]))


def test_running_remembers_earlier_epochs():
    advantages = Advantages("running")
    first = advantages(torch.tensor([0.0, 2.0]), torch.tensor([0, 0]))  # mean 1, deviations -1, 1, std 1
    torch.testing.assert_close(first, torch.tensor([-1.0, 1.0]))
    second = advantages(torch.tensor([4.0, 6.0]), torch.tensor([0, 0]))  # mean of four 3: 1, 3; squares 2 + 10 over 4
    torch.testing.assert_close(second, torch.tensor([1.0, 3.0]) / 3**0.5)


def test_running_state_round_trip():
    first, second = Advantages("running"), Advantages("running")
    first(REWARDS, PROMPT)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(REWARDS + 1, PROMPT), second(REWARDS + 1, PROMPT))


def test_critic_subtracts_what_the_prompt_predicts():
    """Rewards linear in the embedding have advantage 0; what is added within prompts is what remains, normalised."""
    pooled = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    prompt = torch.arange(50).repeat_interleave(20)
    value = 5 + pooled @ torch.tensor([1.0, -2.0, 3.0])
    within = torch.tensor([-1.0, 1.0]).repeat(500)
    advantage = Advantages("critic", pooled)(value[prompt] + within, prompt)
    torch.testing.assert_close(advantage, within, atol=0.02, rtol=0)


def test_critic_forgets_slowly():
    pooled = torch.zeros(1, 2)
    advantages = Advantages("critic", pooled)
    advantages(torch.tensor([0.0, 2.0]), torch.tensor([0, 0]))
    # only the constant remains: mean of (0, 2) with weight 0.9 and (10, 12): (0.9 * 2 + 22) / (0.9 * 2 + 2) = 6.2632
    second = advantages(torch.tensor([10.0, 12.0]), torch.tensor([0, 0]))
    rest = torch.tensor([10.0, 12.0]) - (0.9 * 2 + 22) / (0.9 * 2 + 2)
    torch.testing.assert_close(second, rest / rest.square().mean().sqrt())


def test_critic_state_round_trip():
    pooled = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    first, second = Advantages("critic", pooled), Advantages("critic", pooled)
    first(REWARDS, PROMPT)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(REWARDS + 1, PROMPT), second(REWARDS + 1, PROMPT))


@pytest.mark.parametrize("kind", Advantages.KINDS)
def test_constant_rewards_give_zero(kind):
    pooled = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    assert Advantages(kind, pooled)(torch.full((4,), 28.3), PROMPT).abs().max() < 1e-6


def test_unknown_kind():
    with pytest.raises(ValueError, match="allowed are batch, group"):
        Advantages("groups")
