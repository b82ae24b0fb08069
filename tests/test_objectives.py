"""Every objective's loss against an independent derivation in float64, and what each trains on."""

import math
from dataclasses import replace

import pytest
import torch

from sd3_adrpo.advantages import Advantages
from sd3_adrpo.flow import euler, sde_step
from sd3_adrpo.objectives.adrpo import Adrpo
from sd3_adrpo.objectives.awm import Awm
from sd3_adrpo.objectives.diffusion_nft import DiffusionNft
from sd3_adrpo.objectives.dpo import Dpo
from sd3_adrpo.objectives.flow_grpo import FlowGrpo
from sd3_adrpo.objectives.orw_cfm_w2 import OrwCfmW2
from sd3_adrpo.objectives.raft import Raft
from sd3_adrpo.types import Batch, Condition

COUNT, SHAPE = 6, (2, 3, 3)


def values(seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(COUNT, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


@pytest.fixture
def batch() -> Batch:
    return Batch(
        advantage=torch.tensor([0.9, -0.5, 0.1, -1.3, 0.4, 0.0]),
        sigma=torch.tensor([0.9, 0.8, 0.6, 0.5, 0.3, 0.2]),
        noisy=values(1).float(),
        target=values(2).float(),
        reference=values(3).float(),
        condition=Condition(torch.zeros(COUNT, 1, 1), torch.zeros(COUNT, 1)),
        old=values(4, 0.05).float() + values(5).float(),
        next_noisy=values(6).float(),
        next_sigma=torch.tensor([0.8, 0.7, 0.5, 0.4, 0.2, 0.1]),
    )


V = values(5) + values(7, 0.05)  # near `old`


def rows(tensor: torch.Tensor) -> list[list[float]]:
    return tensor.double().flatten(1).tolist()


def mean_square(first: list[float], second: list[float]) -> float:
    return math.fsum((a - b) ** 2 for a, b in zip(first, second, strict=True)) / len(first)


def check(objective, batch: Batch, expected: list[float]) -> dict[str, torch.Tensor]:
    """Plain Python in double precision against the tensor code, to 1e-6 of the loss's size."""
    loss, metrics = objective.loss(V.float(), batch)
    mean = math.fsum(expected) / len(expected)
    assert loss.item() == pytest.approx(mean, rel=1e-6, abs=1e-6)
    return metrics


def unpack(batch: Batch):
    v, u, ref, old = rows(V.float()), rows(batch.target), rows(batch.reference), rows(batch.old)
    return v, u, ref, old, batch.advantage.double().tolist()


def test_adrpo(batch):
    v, u, ref, _, a = unpack(batch)
    fm = [mean_square(x, y) for x, y in zip(v, u, strict=True)]
    w2 = [mean_square(x, y) for x, y in zip(v, ref, strict=True)]
    check(Adrpo(beta0=2.0), batch, [a[i] * fm[i] + (2.0 - a[i]) * w2[i] for i in range(COUNT)])
    check(Adrpo(beta0=2.0, penalty="fixed"), batch, [a[i] * fm[i] + 2.0 * w2[i] for i in range(COUNT)])
    check(Adrpo(penalty="none"), batch, [a[i] * fm[i] for i in range(COUNT)])


def test_adrpo_options(batch):
    v, u, ref, old, a = unpack(batch)
    fm = [mean_square(x, y) for x, y in zip(v, u, strict=True)]
    anchored = [mean_square(x, y) for x, y in zip(v, old, strict=True)]
    check(Adrpo(refresh_epochs=2), batch, [a[i] * fm[i] + (1 - a[i]) * anchored[i] for i in range(COUNT)])
    weight, metrics = Adrpo(beta0=0.5, clip_range=2.0, positive_only=True).weigh(torch.tensor([-3.0, 0.2, 4.0]))
    assert weight.tolist() == pytest.approx([0.0, 0.2, 1.0])
    assert metrics["clip_rate"] == pytest.approx(2 / 3)
    assert [Adrpo(refresh_epochs=3).old_decay(epoch, 0) for epoch in (1, 2, 3, 6)] == [None, None, 0.0, 0.0]
    assert Adrpo().old_decay(3, 100) is None


def test_orw_cfm_w2(batch):
    v, u, ref, _, w = unpack(batch)
    expected = [
        w[i] * mean_square(v[i], u[i]) + 0.3 * mean_square(v[i], ref[i]) for i in range(COUNT)
    ]  # the batch's `advantage` holds the weights
    check(OrwCfmW2(alpha=0.3), batch, expected)
    weight, metrics = OrwCfmW2(tau=2.0).weigh(torch.tensor([0.0, math.log(2.0)]))
    # exp(2 ln 2) = 4 against 1: over their mean 2.5; effective share 25 / (2 * 17)
    assert weight.tolist() == pytest.approx([0.4, 1.6])
    assert metrics["effective_samples"] == pytest.approx(25 / 34)


def test_raft(batch):
    v, u, _, _, _ = unpack(batch)
    check(Raft(), batch, [mean_square(v[i], u[i]) for i in range(COUNT)])
    advantage = torch.tensor([0.1, 0.9, -0.2, 0.3, 0.2, 0.8])  # two prompts of three samples
    assert Raft().units(advantage, 3).tolist() == [[1], [5]]
    assert Raft(keep=2).units(advantage, 3).tolist() == [[1], [0], [5], [3]]
    assert Raft(keep=9).units_per_group(3) == 3


def test_dpo(batch):
    v, u, ref, _, _ = unpack(batch)
    gain = [mean_square(v[i], u[i]) - mean_square(ref[i], u[i]) for i in range(COUNT)]
    expected = [math.log1p(math.exp(3.0 / 2 * (gain[i] - gain[i + 1]))) for i in range(0, COUNT, 2)]
    metrics = check(Dpo(beta=3.0), batch, expected)
    assert metrics["preference_rate"].item() == pytest.approx(sum(gain[i] < gain[i + 1] for i in (0, 2, 4)) / 3)
    advantage = torch.tensor([0.1, 0.9, -0.2, 0.3, 0.2, 0.8, 0.5, 0.4])  # two prompts of four
    assert Dpo(pairs=2).units(advantage, 4).tolist() == [[1, 2], [3, 0], [5, 4], [6, 7]]
    assert Dpo(pairs=9).units_per_group(4) == 2 and Dpo().units_per_group(1) == 0
    ties = replace(batch, advantage=torch.tensor([0.9, -0.5, 0.1, 0.1, 0.4, 0.4]))
    check(Dpo(beta=3.0), ties, [expected[0], 0.0, 0.0])  # who wins nothing teaches nothing


def gaussian_log_prob(x: list[float], mean: list[float], std: float) -> float:
    """Mean over entries of log N(x; mean, std^2)."""
    terms = [
        -((a - m) ** 2) / (2 * std**2) - math.log(std) - math.log(2 * math.pi) / 2 for a, m in zip(x, mean, strict=True)
    ]
    return math.fsum(terms) / len(terms)


def step_by_hand(x: list[float], v: list[float], sigma: float, to: float, level: float) -> tuple[list[float], float]:
    d = to - sigma
    s = level * math.sqrt(sigma / (1 - (sigma if sigma < 1 else to)))
    mean = [
        a * (1 + s**2 * d / (2 * sigma)) + b * (1 + s**2 * (1 - sigma) / (2 * sigma)) * d
        for a, b in zip(x, v, strict=True)
    ]
    return mean, s * math.sqrt(-d)


def test_flow_grpo(batch):
    """Step, log-probability and ratio by direct evaluation of the Gaussian."""
    v, _, ref, old, a = unpack(batch)
    x, after = rows(batch.noisy), rows(batch.next_noisy)
    objective, expected = FlowGrpo(kl=0.1, clip_range=1e-3), []
    bound = 1e-3 * math.sqrt(65536 / 18)
    for i in range(COUNT):
        sigma, to = batch.sigma[i].item(), batch.next_sigma[i].item()
        (mean, std), (mean_old, _), (mean_ref, _) = (
            step_by_hand(x[i], velocity, sigma, to, 0.7) for velocity in (v[i], old[i], ref[i])
        )
        ratio = math.exp(gaussian_log_prob(after[i], mean, std) - gaussian_log_prob(after[i], mean_old, std))
        limited = min(max(ratio, 1 - bound), 1 + bound)
        kl = mean_square(mean, mean_ref) / (2 * std**2)
        expected.append(0.1 * kl - min(ratio * a[i], limited * a[i]))
    metrics = check(objective, batch, expected)
    assert 0 < metrics["ratio_clip_rate"].item() < 1  # both branches were taken
    assert objective.weigh(torch.tensor([-7.0, 2.0]))[0].tolist() == [-5.0, 2.0]


def test_diffusion_nft(batch):
    v, u, ref, old, r = unpack(batch)
    noisy, expected = rows(batch.noisy), []
    for i in range(COUNT):
        sigma = batch.sigma[i].item()
        clean = [x - sigma * y for x, y in zip(noisy[i], u[i], strict=True)]

        def term(velocity, i=i, sigma=sigma, clean=clean):
            predicted = [x - sigma * y for x, y in zip(noisy[i], velocity, strict=True)]
            weight = math.fsum(abs(p - c) for p, c in zip(predicted, clean, strict=True)) / len(clean)
            return mean_square(predicted, clean) / weight

        plus = [0.7 * a + 0.3 * b for a, b in zip(v[i], old[i], strict=True)]
        minus = [1.7 * b - 0.7 * a for a, b in zip(v[i], old[i], strict=True)]
        expected.append(r[i] * term(plus) + (1 - r[i]) * term(minus) + 0.2 * mean_square(v[i], ref[i]))
    objective = DiffusionNft(beta=0.7, kl=0.2)
    check(objective, batch, expected)
    assert objective.weigh(torch.tensor([-9.0, -2.5, 0.0, 5.0]))[0].tolist() == [0.0, 0.25, 0.5, 1.0]
    assert [objective.old_decay(1, n) for n in (10, 300, 900)] == pytest.approx([0.01, 0.3, 0.5])


def test_awm(batch):
    v, u, ref, old, a = unpack(batch)
    expected = []
    for i in range(COUNT):
        ratio = math.exp(mean_square(old[i], u[i]) - mean_square(v[i], u[i]))
        limited = min(max(ratio, 0.99), 1.01)
        distance = 0.2 * mean_square(v[i], ref[i]) + 0.5 * mean_square(v[i], old[i])
        expected.append(distance - min(ratio * a[i], limited * a[i]))
    metrics = check(Awm(clip_range=0.01, kl=0.2, kl_old=0.5), batch, expected)
    assert 0 < metrics["ratio_clip_rate"].item() < 1


def test_policy_gradients_agree_where_nothing_is_clipped(batch):
    """At v = v_old AWM's ratio is 1 and its gradient that of A |v - u|^2: ADRPO's without a penalty."""
    v = batch.old.clone().requires_grad_()
    (awm,) = torch.autograd.grad(Awm(kl=0.0, kl_old=0.0).loss(v, batch)[0], v)
    (adrpo,) = torch.autograd.grad(Adrpo(penalty="none").loss(v, batch)[0], v)
    torch.testing.assert_close(awm, adrpo)


def test_sde_step_without_noise_is_euler(batch):
    mean, std = sde_step(batch.noisy, batch.target, batch.sigma, batch.next_sigma, 0.0)
    for i in range(COUNT):
        sigma, to = batch.sigma[i].item(), batch.next_sigma[i].item()
        expected = euler(lambda x, _, i=i: batch.target[i : i + 1], batch.noisy[i : i + 1], sigma, to)
        torch.testing.assert_close(mean[i : i + 1], expected)
    assert std.abs().max() == 0


def test_sde_step_from_pure_noise():
    x, v = torch.tensor([[[[0.3, -0.2]]]]), torch.tensor([[[[1.0, 0.5]]]])
    mean, std = sde_step(x, v, torch.tensor([1.0]), torch.tensor([0.9]), 0.7)
    expected, level = step_by_hand([0.3, -0.2], [1.0, 0.5], 1.0, 0.9, 0.7)
    assert mean.flatten().tolist() == pytest.approx(expected, rel=1e-5)
    assert std.item() == pytest.approx(level, rel=1e-5)


def test_sde_keeps_the_marginals_of_the_ode():
    """Data N(2, 0.5^2): the exact velocity is linear, and the SDE's samples must have that mean and spread."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20000, 1, 1, 1, generator=generator, dtype=torch.double)
    grid = torch.linspace(1, 0, 201, dtype=torch.double)
    for sigma, to in zip(grid[:-1], grid[1:], strict=True):
        variance = (1 - sigma) ** 2 * 0.25 + sigma**2
        slope = (sigma - (1 - sigma) * 0.25) / variance  # of E[noise - clean | x] in x
        v = -2 + slope * (x - (1 - sigma) * 2)
        at, towards = sigma.expand(len(x)), to.expand(len(x))
        mean, std = sde_step(x, v, at, towards, 0.7 if to > 0 else 0.0)
        x = mean + std * torch.randn(x.shape, generator=generator, dtype=torch.double)
    assert x.mean().item() == pytest.approx(2.0, abs=0.02)
    assert x.std().item() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (OrwCfmW2, {"tau": 0.0}),
        (OrwCfmW2, {"alpha": -1.0}),
        (Raft, {"keep": 0}),
        (Dpo, {"beta": 0.0}),
        (Dpo, {"pairs": 0}),
        (FlowGrpo, {"noise_level": 0.0}),
        (FlowGrpo, {"clip_range": 0.0}),
        (DiffusionNft, {"beta": 0.0}),
        (Awm, {"clip_range": 0.0}),
        (Adrpo, {"refresh_epochs": -1}),
    ],
)
def test_refuses(cls, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        cls(**options)


def test_every_objective_names_a_kind_of_advantage():
    for cls in (Adrpo, Awm, DiffusionNft, Dpo, FlowGrpo, OrwCfmW2, Raft):
        assert cls().advantage in Advantages.KINDS
