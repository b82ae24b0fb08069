"""Diversity, drift and standard errors against values worked out by hand."""

from __future__ import annotations

import math
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from sd3_adrpo.flow import seeded_noise
from sd3_adrpo.metrics import clip_diversity, mean_and_stderr, paired_difference, w2_drift
from sd3_adrpo.seeds import seed_for
from sd3_adrpo.types import Condition


def test_identical_images_have_no_diversity_and_orthogonal_ones_have_one():
    same, orthogonal = torch.tensor([[3.0, 4.0, 0.0]]).repeat(4, 1), 2 * torch.eye(3)
    diversity = clip_diversity(torch.cat([same, orthogonal]), torch.tensor([0] * 4 + [1] * 3))
    assert torch.allclose(diversity, torch.tensor([0.0, 1.0], dtype=torch.double), atol=1e-12)


def test_diversity_is_the_mean_over_pairs_within_each_prompt_in_any_order():
    generator = torch.Generator().manual_seed(0)
    embeddings, prompt = torch.randn(7, 5, generator=generator), torch.tensor([4, 2, 4, 2, 4, 4, 2])
    unit = embeddings / embeddings.norm(dim=1, keepdim=True)

    def by_pairs(rows: list[int]) -> float:
        pairs = [(i, j) for i in rows for j in rows if i < j]
        return sum(1 - (unit[i] @ unit[j]).item() for i, j in pairs) / len(pairs)

    assert clip_diversity(embeddings, prompt).tolist() == pytest.approx([by_pairs([1, 3, 6]), by_pairs([0, 2, 4, 5])])


def test_one_image_has_no_diversity_to_measure():
    diversity = clip_diversity(torch.eye(3), torch.tensor([0, 1, 1]))
    assert math.isnan(diversity[0]) and diversity[1].item() == pytest.approx(1.0)


def test_stderr_of_independent_values():
    found = mean_and_stderr(torch.tensor([1.0, 2.0, 3.0, 6.0, float("nan")]))
    # mean 3, squares 4 + 1 + 0 + 9 = 14, variance 14 / 3, over 4 values
    assert found == pytest.approx({"mean": 3.0, "stderr": math.sqrt(14 / 3 / 4)})


def test_too_few_values_give_none():
    assert mean_and_stderr(torch.tensor([float("nan")])) == {"mean": None, "stderr": None}
    assert mean_and_stderr(torch.tensor([2.0])) == {"mean": 2.0, "stderr": None}
    assert mean_and_stderr(torch.tensor([2.0, 4.0]), torch.tensor([7, 7])) == {"mean": 3.0, "stderr": None}


def test_pairing_removes_what_both_share():
    before = torch.tensor([10.0, 20.0, 30.0, 40.0])
    found = paired_difference(before, before + torch.tensor([1.0, 3.0, 1.0, 3.0]))
    # differences 1 3 1 3: mean 2, variance 4 / 3, over 4 values
    assert found == pytest.approx({"mean": 2.0, "stderr": math.sqrt(1 / 3)})


def test_error_is_clustered_by_prompt():
    before, gain = torch.zeros(4), torch.tensor([1.0, 1.0, 3.0, 3.0])
    found = paired_difference(before, gain, torch.tensor([5, 5, 9, 9]))
    # two prompts that gained 1 and 3: mean 2, variance of the prompts 2, over 2 prompts
    assert found == pytest.approx({"mean": 2.0, "stderr": 1.0})
    uneven = paired_difference(torch.zeros(3), torch.tensor([0.0, 0.0, 3.0]), torch.tensor([0, 0, 1]))
    # residuals -1 -1 | 2, cluster sums -2 and 2: sqrt(2 / 1 * (4 + 4)) / 3
    assert uneven == pytest.approx({"mean": 1.0, "stderr": 4 / 3})


class _Policy:
    """v = 3 * noisy + offset of the prompt; the reference 2 * noisy + offset: they differ by noisy itself."""

    model = SimpleNamespace(device=torch.device("cpu"))
    scale = 3.0

    def velocity(self, noisy, sigma, condition):
        return self.scale * noisy + condition.pooled[:, :1, None, None]

    @contextmanager
    def reference(self):
        self.scale = 2.0
        yield
        self.scale = 3.0


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_drift_is_the_mean_square_over_latents_and_sigmas(batch_size):
    sigmas, seeds, clean = (0.8, 0.25), [3, 4, 5], seeded_noise([0, 1, 2], (2, 3, 3))
    condition = Condition(torch.zeros(2, 1, 1), torch.tensor([[0.5], [7.0]]))
    drift = w2_drift(_Policy(), clean, condition, torch.tensor([0, 1, 0]), seeds, sigmas, batch_size)
    for row, seed in enumerate(seeds):
        noise = seeded_noise([seed_for(seed, "drift", 0), seed_for(seed, "drift", 1)], (2, 3, 3))
        noisy = [(1 - sigma) * clean[row] + sigma * noise[number] for number, sigma in enumerate(sigmas)]
        assert drift[row].item() == pytest.approx(torch.stack(noisy).square().mean().item(), rel=1e-5)


def test_drift_of_a_policy_equal_to_its_reference_is_zero():
    policy = _Policy()
    policy.scale = 2.0
    condition = Condition(torch.zeros(1, 1, 1), torch.zeros(1, 1))
    assert w2_drift(policy, torch.ones(1, 2, 3, 3), condition, torch.tensor([0]), [1]).tolist() == [0.0]
