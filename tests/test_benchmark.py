"""The benchmark's clock and ledger, and one small run of all of it."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "eval"))

import benchmark  # noqa: E402
from timing import Breakdown, Clock  # noqa: E402


class Hands:
    """A clock that moves when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_serial_loop_has_what_the_loss_needs():
    """It computes a frozen reference and nothing else; the built-in preset's own reference moves."""
    from sd3_adrpo import cli

    assert cli.parse(benchmark.SIZES["shapes"].split()).objective.needs == ("reference",)


def test_breakdown_counts_for_the_innermost():
    hands = Hands()

    class Work:
        def outer(self):
            hands.now += 1
            self.inner()
            hands.now += 2

        def inner(self):
            hands.now += 10

    work, ledger = Work(), Breakdown(hands)
    with ledger.watching((work, "outer", "sampling"), (work, "inner", "model, {}")):
        work.outer()
        work.inner()
    assert ledger.seconds == {"sampling": 3.0, "model, sampling": 10.0, "model, ": 10.0}
    assert not vars(work)  # unwrapped


def test_comparison_warms_up_and_takes_the_median(monkeypatch):
    hands, clock, order = Hands(), Clock(torch.device("cpu")), []
    durations = {"a": iter([100.0, 1.0, 9.0, 2.0]), "b": iter([100.0, 4.0, 5.0, 6.0])}

    def action(name):
        def call():
            order.append(name)
            hands.now += next(durations[name])

        return call

    monkeypatch.setattr(Clock, "__call__", lambda self: hands.now)
    assert clock.compare({"a": action("a"), "b": action("b")}, 3) == {"a": 2.0, "b": 5.0}
    assert order == ["a", "b"] * 4


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("benchmark")
    arguments = "--shape tiny --batch_size 4 --num_inference_steps 2 --repeats 1 --train.gradient_accumulation_steps 1"
    arguments += " --train.inner_epochs 2"
    assert benchmark.main([*arguments.split(), "--lora.rank", "2", "--output_dir", str(folder)]) == 0
    return json.loads((folder / "benchmark.json").read_text())


def test_all_ratios_are_there(result):
    for name in "rollout_vs_bare rollout_vs_stock train_vs_serial epoch_vs_parts merge_gain overlap_gain".split():
        assert 0.01 < result[name] < 100, name


def test_serial_loop_has_the_same_loss(result):
    assert result["train_loss_difference"] < 1e-5


def test_breakdown_adds_up(result):
    epoch = result["epoch"]
    assert {"transformer, sampling", "transformer, reference pass", "transformer, training", "backward"} <= set(
        epoch["breakdown"]
    )
    assert all(value >= 0 for value in epoch["breakdown"].values())
    assert {"without merged LoRA", "with one noise for all inner epochs"} <= set(epoch["relative_seconds"])
    assert epoch["peak_memory_bytes"]["training"] > 1e7


def test_memory_of_every_epoch(capsys):
    """The resident set grows at first; after that a leak of an epoch's latents or images would show."""
    arguments = "--shape tiny --memory 6 --rollout.num_inference_steps 2 --lora.rank 2"
    assert benchmark.main(arguments.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "images per epoch" in line] == [
        f"{images} images per epoch, 6 epochs" for images in (8, 32)
    ]
    ratios = [float(line.split()[-1]) for line in lines if "the last epoch" in line]
    assert len(ratios) == 2 and all(0.8 < ratio < 1.05 for ratio in ratios)


def test_medium_needs_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark.main(["--shape", "sd3.5-medium"]) == 1
    assert "needs a CUDA GPU" in capsys.readouterr().err
