"""The flow in the plane: its base, its measures, and that objectives climb."""

import math

import pytest
import torch

from sd3_adrpo import cli
from sd3_adrpo.landscapes import LANDSCAPES, Run, bump, entropy, train_base
from sd3_adrpo.objectives.adrpo import Adrpo
from sd3_adrpo.objectives.raft import Raft


@pytest.fixture(scope="module")
def base():
    return train_base(updates=600)


def test_entropy_of_a_normal_distribution():
    points = 0.5 * torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    assert entropy(points) == pytest.approx(math.log(2 * math.pi * math.e * 0.25), abs=0.06)


def test_bump_by_hand():
    assert bump(torch.tensor([[1.0, 2.0], [1.0, 0.0]]), 1.0, 2.0, 1.0).tolist() == pytest.approx([1.0, math.exp(-2)])


def test_landscapes_are_what_they_are_called():
    at = torch.tensor([[-1.0, 0.0], [2.5, 0.0], [0.0, 0.0], [-2.0, 0.0]])
    low, high, _, _ = LANDSCAPES["bimodal"](at).tolist()
    assert high > 1.5 * low
    assert LANDSCAPES["plateau"](torch.zeros(1, 2)).item() < 1e-4  # no slope where the base draws
    _, peak, centre, left = LANDSCAPES["deceptive"](at).tolist()
    assert peak > left > centre  # the slope at the centre leads away from the peak


def test_base_draws_a_normal_distribution(base):
    trace = Run(Adrpo(), "unimodal", base, 0)(epochs=0)
    assert trace.samples[0].mean(0).abs().max() < 0.15 and trace.samples[0].std() == pytest.approx(1.0, abs=0.15)
    assert trace.drift == [0.0]


@pytest.mark.parametrize("name", [name for name in cli.available("objective")])
def test_objectives_climb_a_hill(base, name):
    objective = cli.parse(["--config=sd3.5-medium", f"--objective={name}"]).objective
    trace = Run(objective, "unimodal", base, 0)(epochs=6)
    assert trace.reward[-1] > trace.reward[0] + 0.015, trace.reward
    assert trace.drift[-1] > 0


def test_raft_narrows_more_than_adrpo(base):
    adrpo, raft = (Run(objective, "unimodal", base, 0)(epochs=6) for objective in (Adrpo(), Raft()))
    assert raft.entropy[-1] < adrpo.entropy[-1] and raft.drift[-1] > adrpo.drift[-1]


def test_runs_repeat(base):
    first, second = (Run(Adrpo(), "noisy", base, 4)(epochs=1) for _ in range(2))
    assert torch.equal(first.samples, second.samples)
