"""Full fine-tuning on two CPU processes, and FSDP2 shards there: the same updates, checkpoints and exports as one's."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sd3_adrpo.errors import UserError
from sd3_adrpo.shapes import PIPELINE_DIR
from sd3_adrpo.sharding import asked_to_shard

ROOT = Path(__file__).parent.parent
NAMES = ("ACCELERATE_USE_FSDP", "FSDP_VERSION", "FSDP_OFFLOAD_PARAMS", "ACCELERATE_USE_DEEPSPEED")
LOADING = "FSDP_CPU_RAM_EFFICIENT_LOADING"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, str]:
    """The folder of shards.py and what it printed."""
    folder = tmp_path_factory.mktemp("shards")
    command = [sys.executable, str(Path(__file__).parent / "shards.py"), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def _transformer(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def _apart(one: dict, other: dict, start: dict) -> float:
    """|one - other| / |one - start| over all weights."""
    assert one.keys() == other.keys() == start.keys()
    difference = sum((one[name] - other[name]).double().square().sum() for name in one)
    return (difference / sum((one[name] - start[name]).double().square().sum() for name in one)).sqrt().item()


def test_every_run_ends_well(runs):
    codes = ast.literal_eval(re.search(r"^codes (.*)$", runs[1], re.M)[1])
    both = [0, 0]
    assert codes == {
        **{"full1": [0], "full2": both, "shards2": both},
        **{"resumed1": [0], "resumed2": both, "lora1": [0], "lora2": both},
    }


@pytest.mark.parametrize("name", ["full2", "shards2", "resumed1", "resumed2"])
def test_processes_and_shards_end_with_the_same_transformer(runs, name):
    """Two epochs of two updates; `resumed1` did the first as shards on two, `resumed2` as one, the second otherwise."""
    folder, _ = runs
    start = _transformer(PIPELINE_DIR)
    one, other = _transformer(folder / "full1"), _transformer(folder / name)
    moved = sum((one[key] - start[key]).double().square().sum() for key in one).sqrt()
    assert moved > 0.1
    assert _apart(one, other, start) < 1e-3  # measured: 4e-5


def test_a_lora_on_shards_is_the_same(runs):
    folder, _ = runs
    one, other = (load_file(folder / name / "lora" / "pytorch_lora_weights.safetensors") for name in ("lora1", "lora2"))
    up = [key for key in one if "lora_B" in key]
    assert _apart({k: one[k] for k in up}, {k: other[k] for k in up}, {k: one[k] * 0 for k in up}) < 1e-3


def test_checkpoints_of_shards_are_whole(runs):
    folder, _ = runs
    one, shards = (
        torch.load(folder / name / "checkpoints" / "epoch-0002" / "state.pt", weights_only=True)
        for name in ("full1", "shards2")
    )
    for part in (lambda state: state["lora"], lambda state: state["optimizer"]["state"][0]):
        shapes = [{name: tuple(value.shape) for name, value in part(state).items()} for state in (one, shards)]
        assert shapes[0] == shapes[1] and len(shapes[0]) > 2
    assert [old.shape for old in one["old"]] == [old.shape for old in shards["old"]]


@pytest.fixture
def environment(monkeypatch):
    for name in (*NAMES, LOADING):
        monkeypatch.delenv(name, raising=False)
    return lambda **values: [monkeypatch.setenv(name, value) for name, value in values.items()]


def test_shards_only_when_asked_and_with_company(environment):
    assert not asked_to_shard(2)
    environment(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", **{LOADING: "true"})
    assert not asked_to_shard(1) and asked_to_shard(2)
    assert os.environ[LOADING] == "false"  # else process 1 has no text encoder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp_version is 1; only 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed, which is not supported: use docs/accelerate/fsdp2.yaml"),
    ],
)
def test_what_is_not_supported_is_said(environment, options, message):
    environment(**options)
    with pytest.raises(UserError, match=message):
        asked_to_shard(2)


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2-two-machines"])
def test_the_shipped_configs_are_what_we_support(name):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(ROOT / "docs" / "accelerate" / f"{name}.yaml"))
    assert config.distributed_type == "FSDP" and config.fsdp_config["fsdp_version"] == 2
    assert config.num_processes == 8 * config.num_machines and config.mixed_precision == "no"
    assert config.fsdp_config["fsdp_cpu_ram_efficient_loading"] is False
