"""Compiled blocks compute the same; where nothing compiles the run goes on as it was."""

import logging

import pytest
import torch

from sd3_adrpo.compiling import compile_blocks
from sd3_adrpo.config import LoraConfig
from sd3_adrpo.models.sd3 import SD3
from sd3_adrpo.policy import Policy
from sd3_adrpo.types import Condition


@pytest.fixture
def policy(tiny_sd35) -> Policy:
    torch._dynamo.reset()
    return Policy(SD3.load(str(tiny_sd35), max_sequence_length=8), LoraConfig(rank=2, alpha=2.0))


CONDITION = Condition(torch.ones(1, 24, 48), torch.ones(1, 40))


def velocity(policy: Policy) -> torch.Tensor:
    noisy = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    return policy.velocity(noisy, torch.tensor([0.9, 0.1]), CONDITION.select(torch.tensor([0, 0]))).detach()


def test_compiled_blocks_compute_the_same(policy):
    expected, graphs = velocity(policy), []

    def counting(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    assert compile_blocks(policy, CONDITION, (16, 8, 8), 2, 2, backend=counting)
    assert graphs and all(parameter.grad is None for parameter in policy.parameters())
    torch.testing.assert_close(velocity(policy), expected, atol=1e-6, rtol=1e-5)
    known = len(graphs)
    velocity(policy)
    assert len(graphs) == known  # never twice for one shape


def test_a_failing_compiler_is_a_warning(policy, caplog):
    expected = velocity(policy)

    def broken(graph, example_inputs):
        raise RuntimeError("no compiler here")

    with caplog.at_level(logging.WARNING, "sd3_adrpo.compiling"):
        assert not compile_blocks(policy, CONDITION, (16, 8, 8), 2, 2, backend=broken)
    assert "compile is off" in caplog.text
    assert torch.equal(velocity(policy), expected)
