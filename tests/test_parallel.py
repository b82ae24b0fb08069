"""1, 2 and 4 processes on the CPU: the same images, advantages and updates, and the same end."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from sd3_adrpo import log
from sd3_adrpo.errors import UserError
from sd3_adrpo.parallel import failing_together, gather_rows, share

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, str]:
    """The folder of processes.py and what it printed."""
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, str(Path(__file__).parent / "processes.py"), str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def test_shares_are_in_order_and_even():
    parts = [share(10, SimpleNamespace(num_processes=4, process_index=process)) for process in range(4)]
    assert [(part.start, part.stop) for part in parts] == [(0, 2), (2, 5), (5, 7), (7, 10)]


def test_one_process_gathers_itself_and_raises_its_own_error():
    alone = SimpleNamespace(num_processes=1, process_index=0)
    values = torch.arange(6.0).view(3, 2)
    assert torch.equal(gather_rows(values, 3, alone), values)
    with pytest.raises(UserError, match="^too dark$"), failing_together(alone):
        raise UserError("too dark")


def test_every_run_ends_as_it_should(runs):
    folder, output = runs
    codes = ast.literal_eval(re.search(r"^codes (.*)$", output, re.M)[1])
    assert codes == {"on1": [0], "on2": [0, 0], "on4": [0] * 4, "resumed": [0], "broken": [1, 1]}


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_train_on_the_same_samples(runs, processes):
    folder, _ = runs
    one = torch.load(folder / "on1-epoch0-process0.pt", weights_only=True)
    assert len(one["clean"]) == 18 and one["advantage"].abs().max() > 0.1
    for process in range(processes):
        other = torch.load(folder / f"on{processes}-epoch0-process{process}.pt", weights_only=True)
        assert other["updates"] == one["updates"] == 2
        # other batches of the same noise: matrix products round differently
        torch.testing.assert_close(other["clean"], one["clean"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(other["rewards"], one["rewards"], atol=0.05, rtol=0)  # a grey level is worth so much
        torch.testing.assert_close(other["advantage"], one["advantage"], atol=0.01, rtol=0)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_a_measurement(runs, processes):
    """Six images, of which 4 processes draw 1, 2, 1 and 2: every value in its own row."""
    folder, _ = runs
    one, other = (torch.load(folder / f"on{n}" / "before.pt", weights_only=True)["value"] for n in (1, processes))
    assert one["prompt"].tolist() == other["prompt"].tolist() == [0, 0, 1, 1, 2, 2]
    assert (one["images"].int() - other["images"].int()).abs().max() <= 1  # a grey level, where rounding tips it
    assert one["reward"].unique().numel() == 6 and one["scores"].keys() == other["scores"].keys()
    torch.testing.assert_close(other["reward"], one["reward"], atol=0.05, rtol=0)
    torch.testing.assert_close(other["clip_diversity"], one["clip_diversity"], atol=1e-3, rtol=0)
    torch.testing.assert_close(other["accuracy"], one["accuracy"], equal_nan=True)
    first, second = (json.loads((folder / f"on{n}" / "summary.json").read_text())["after"] for n in (1, processes))
    assert first["w2_drift"] == pytest.approx(second["w2_drift"], rel=1e-3) and first["w2_drift"] > 0


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_log_the_same_metrics(runs, processes):
    folder, _ = runs
    one, other = (log.read(folder / f"on{n}" / "metrics.jsonl", "update")[0] for n in (1, processes))
    assert one.keys() == other.keys() and one["fm"] > 0.1 and one["grad_norm"] > 0
    assert one.pop("kind") == other.pop("kind")
    assert other == pytest.approx(one, rel=0.02, abs=1e-4)


def _lora(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "lora" / "pytorch_lora_weights.safetensors")


@pytest.mark.parametrize("name", ["on2", "on4", "resumed"])
def test_processes_end_with_the_same_lora(runs, name):
    """Two epochs of two updates each; `resumed` did its first epoch on two processes and its second on one."""
    folder, _ = runs
    expected, got = _lora(folder / "on1"), _lora(folder / name)
    assert expected.keys() == got.keys()
    moved = torch.cat([value.flatten() for key, value in expected.items() if "lora_B" in key])
    other = torch.cat([value.flatten() for key, value in got.items() if "lora_B" in key])
    assert moved.norm() > 0.05  # lora_B starts at zero
    assert (other - moved).norm() / moved.norm() < 1e-3  # measured: 2e-5 to 3e-5


def test_checkpoints_are_written_once(runs):
    folder, _ = runs
    assert [path.name for path in (folder / "on4" / "checkpoints").iterdir()].count("epoch-0002") == 1
    assert not list(folder.glob("*/checkpoints/*.tmp"))
    assert len((folder / "on4" / "metrics.jsonl").read_text().splitlines()) == 1 + 2 * (2 + 1)


def test_one_failing_reward_ends_all_with_its_message(runs):
    folder, output = runs
    assert re.findall(r"^UserError: (.*)$", output, re.M) == ["process 1: the reward is nan for 1 of 9 images"]
    assert (folder / "broken" / "checkpoints" / "epoch-0001" / "state.pt").exists()  # the epoch before is not lost
