"""The whole loop: it learns, it resumes bit-exactly, it stops on signals, it exports what it trained."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import interrupted_after

from sd3_adrpo import cli, plan
from sd3_adrpo.errors import UserError
from sd3_adrpo.run import Run
from sd3_adrpo.samples import image_path, load_samples

ROOT = Path(__file__).parent.parent
SMALL = """--rollout.prompts_per_epoch 4 --rollout.samples_per_prompt 4 --rollout.num_inference_steps 3
    --rollout.batch_size 8 --train.batch_size 4 --train.gradient_accumulation_steps 2 --train.inner_epochs 2
    --train.sigmas_per_sample 2 --eval.samples_per_prompt 2 --eval.num_inference_steps 2 --checkpointing_epochs 1
    --validation_epochs 1 --epochs 2 --report_to none --lora.rank 4 --lora.alpha 4""".split()


@pytest.fixture
def few_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\ntwo blue squares\na green heart above a pink cross\nan orange diamond\n")
    return str(path)


def run(*arguments: str) -> dict:
    return run_as([*SMALL, *arguments])


def run_as(argv: list[str]) -> dict:
    config = cli.parse(argv)
    return Run(config, plan.check(config))()


def lora_of(folder) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "lora" / "pytorch_lora_weights.safetensors")


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_leaves_what_it_promises(tmp_path, few_prompts):
    folder = tmp_path / "run"
    summary = run("--prompts", few_prompts, "--output_dir", str(folder))
    for name in "config.yaml prompts.json metrics.jsonl before_after.png curves.png lora/README.md".split():
        assert (folder / name).stat().st_size > 0, name
    assert (folder / "grids" / "epoch-0001.png").exists()
    samples = load_samples(folder)
    assert all(image_path(folder, phase, 1, 1).is_file() for phase in ("before", "after"))
    stored = json.loads((folder / "summary.json").read_text())
    assert stored["images"] == 32 and stored["epochs"] == 2 and stored["objective"] == "adrpo"
    assert set(stored["before"]) == {"reward", "clip_diversity", "w2_drift", "accuracy", "free_diversity"}
    assert stored["before"]["w2_drift"] == 0.0 and stored["after"]["w2_drift"] > 0
    assert stored["lora_difference"] < 1e-5
    assert sum(samples["after"]["reward"]) / len(samples["after"]["reward"]) == pytest.approx(
        summary["after"]["reward"]
    )
    assert summary["after"]["reward"] == pytest.approx(stored["after"]["reward"])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[0] == {"kind": "scores", "reward/clip": "100 x cosine, shapes"}  # units, before any number
    assert [line["kind"] for line in lines].count("update") == 8  # 2 epochs x 2 inner x 16 / 8
    assert cli.parse(["--config", str(folder / "config.yaml")]) == cli.parse(
        [*SMALL, "--prompts", few_prompts, "--output_dir", str(folder)]
    )


@pytest.mark.parametrize("updates", [1, 6])
def test_resume_is_bit_exact(tmp_path, few_prompts, updates):
    """Interrupted after so many updates, within the first and the second epoch, against the uninterrupted run."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    running = ["--prompts", few_prompts, "--objective.advantage", "running"]
    run(*running, "--output_dir", str(whole))
    with pytest.raises(SystemExit) as stop, interrupted_after(updates):
        run(*running, "--output_dir", str(parts))
    assert stop.value.code == 130
    torch.manual_seed(99)  # nothing may hang on the global generator
    run(*running, "--resume_from_checkpoint", str(parts))
    assert equal(lora_of(whole), lora_of(parts))
    first, second = (json.loads((folder / "summary.json").read_text()) for folder in (whole, parts))
    assert first["after"] == second["after"]


@pytest.mark.parametrize("objective", ["orw_cfm_w2", "raft", "dpo", "flow_grpo", "diffusion_nft", "awm"])
def test_every_objective_resumes_bit_exactly(tmp_path, few_prompts, monkeypatch, objective):
    """Paths, averaged weights and pairs are part of the state."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = ["--prompts", few_prompts, "--objective", objective]
    options += (
        "--validation_epochs 9 --eval.samples_per_prompt 1 --eval.num_inference_steps 1".split()
    )  # not their state
    monkeypatch.setattr("sd3_adrpo.figures.curves", lambda *_: None)
    run(*options, "--output_dir", str(whole))
    with pytest.raises(SystemExit), interrupted_after(3):
        run(*options, "--output_dir", str(parts))
    run(*options, "--resume_from_checkpoint", str(parts))
    assert equal(lora_of(whole), lora_of(parts))
    assert any(value.abs().max() > 0 for name, value in lora_of(whole).items() if "lora_B" in name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--objective", "dpo", "--rollout.samples_per_prompt", "1"], "must be at least 2"),
        (["--objective", "flow_grpo", "--rollout.solver", "heun"], "leave out rollout.guidance_scale"),
        (["--objective", "flow_grpo", "--train.sigmas_per_sample", "3"], "raise rollout.num_inference_steps"),
    ],
)
def test_objectives_refuse_what_they_cannot_use(tmp_path, few_prompts, options, message):
    with pytest.raises(UserError, match=message):
        run("--prompts", few_prompts, "--output_dir", str(tmp_path / "run"), *options)


def test_batch_sizes_do_not_change_the_images(tmp_path, few_prompts):
    config = cli.parse([*SMALL, "--prompts", few_prompts, "--output_dir", str(tmp_path / "a")])
    one = Run(config, plan.check(config))
    one._load()
    one.trainer._sample(lambda *_: None)
    config = cli.parse(
        [*SMALL, "--prompts", few_prompts, "--output_dir", str(tmp_path / "b"), "--rollout.batch_size", "3"]
    )
    other = Run(config, plan.check(config))
    other._load()
    other.trainer._sample(lambda *_: None)
    # the noise is bit-equal (test_flow.py); a matrix product rounds differently for another number of rows
    torch.testing.assert_close(one.trainer.rollout.clean, other.trainer.rollout.clean, atol=1e-4, rtol=0)


def test_full_sd35_parts_train_resume_and_export(tmp_path, tiny_sd35, few_prompts):
    folder = tmp_path / "run"
    arguments = ["--model", str(tiny_sd35), "--config", "sd3.5-medium", "--prompts", few_prompts]
    arguments += "--rollout.height 64 --rollout.width 64 --rollout.max_sequence_length 16".split()
    arguments += "--reward.model shapes --reward.pretrained null".split()
    arguments += "--train.mixed_precision no --train.gradient_checkpointing true".split()
    summary = run(*arguments, "--output_dir", str(folder))
    assert summary["lora_difference"] < 1e-5
    again = run(*arguments, "--epochs", "3", "--resume_from_checkpoint", str(folder))
    assert again["epochs"] == 3


def test_learning_check_finds_a_cut_gradient(tmp_path, few_prompts, monkeypatch):
    from sd3_adrpo.models.sd3 import SD3

    velocity = SD3.velocity
    monkeypatch.setattr(SD3, "velocity", lambda *args, **options: velocity(*args, **options).detach().requires_grad_())
    with pytest.raises(UserError, match="no gradient reaches lora_B"):
        run("--prompts", few_prompts, "--output_dir", str(tmp_path / "run"))


def test_a_reward_of_nan_stops_and_loses_nothing(tmp_path, few_prompts, monkeypatch):
    from sd3_adrpo.rewards.clip import ClipScorer

    folder, calls = tmp_path / "run", []
    call = ClipScorer.__call__

    def fails(self, images, prompts):
        calls.append(1)
        return call(self, images * (float("nan") if len(calls) > 2 else 1.0), prompts)

    monkeypatch.setattr(ClipScorer, "__call__", fails)
    with pytest.raises(UserError):
        run("--prompts", few_prompts, "--output_dir", str(folder))
    monkeypatch.setattr(ClipScorer, "__call__", call)
    assert run("--prompts", few_prompts, "--resume_from_checkpoint", str(folder))["epochs"] == 2


def test_truncated_checkpoint(tmp_path, few_prompts):
    folder = tmp_path / "run"
    run("--prompts", few_prompts, "--output_dir", str(folder), "--epochs", "1")
    state = folder / "checkpoints" / "epoch-0001" / "state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read"):
        run("--prompts", few_prompts, "--resume_from_checkpoint", str(folder))


def test_sigterm_saves(tmp_path, few_prompts):
    folder = tmp_path / "run"
    command = [sys.executable, "train_sd3.py", *SMALL, "--prompts", few_prompts, "--output_dir", str(folder)]
    process = subprocess.Popen(
        [*command, "--epochs", "500"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    while process.poll() is None and not (folder / "checkpoints" / "epoch-0001").exists():
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    output = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 130, output
    assert "stopped and saved" in output
    assert list(folder.glob("checkpoints/*/state.pt"))


def test_a_reward_that_fails_in_the_middle_of_an_epoch_costs_one_batch(tmp_path, few_prompts):
    """Two batches an epoch; the reward dies in the second of the second epoch. Resumed, the run equals a whole one."""
    counted, switch = tmp_path / "calls", tmp_path / "broken"
    reward = tmp_path / "mine.py"
    reward.write_text(
        "import pathlib\n"
        f"counted, switch = pathlib.Path({str(counted)!r}), pathlib.Path({str(switch)!r})\n"
        "def score(images, prompts):\n"
        "    calls = int(counted.read_text()) + 1 if counted.exists() else 1\n"
        "    counted.write_text(str(calls))\n"
        "    if switch.exists() and calls == int(switch.read_text()):\n"
        "        raise TypeError('broken')\n"
        "    return images.float().mean((1, 2, 3)) / 255\n"
    )
    options = ["--prompts", few_prompts, "--reward", "python=2,jpeg=0.5", "--reward.normalise", "batch"]
    options += ["--reward.python.function", f"{reward}:score", "--watch", "shapes"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    summary = run(*options, "--output_dir", str(whole))
    calls = int(counted.read_text())
    line = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()][-1]
    assert {"reward/python", "reward/jpeg", "watch/shapes"} <= line.keys() and line["reward"] == pytest.approx(
        0, abs=1e-4
    )
    assert set(summary["rewards"]) == {"python", "jpeg"} and set(summary["watch"]) == {"shapes"}
    assert summary["watch"]["shapes"]["before"]["mean"] == pytest.approx(summary["before"]["accuracy"])
    counted.unlink()
    switch.write_text(str(calls - 1))  # the last call measures the trained policy, the one before it is of the rollout
    with pytest.raises(UserError, match="the reward python failed for the prompts? .*TypeError: broken"):
        run(*options, "--output_dir", str(parts))
    state = torch.load(parts / "checkpoints" / "epoch-0001" / "state.pt", weights_only=True)
    assert [len(part["prompt"]) for part in state["sampled"]] == [8]
    switch.unlink()
    shutil.copytree(parts, tmp_path / "other")
    run_as(["--resume_from_checkpoint", str(parts)])  # its options are its own
    assert equal(lora_of(whole), lora_of(parts))
    again = run_as(["--resume_from_checkpoint", str(tmp_path / "other"), "--reward", "jpeg", "--watch", "none"])
    assert set(again["rewards"]) == {"jpeg"}  # the batch that has no such score is drawn again
