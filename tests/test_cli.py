"""The command line, the presets, and what a run checks before it loads anything heavy."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import train_sd3
from sd3_adrpo import cli, plan, prompt_choice, shapes
from sd3_adrpo.config import Config, EvalConfig, LoraConfig, RolloutConfig, TrainConfig
from sd3_adrpo.errors import UserError
from sd3_adrpo.objectives.adrpo import Adrpo
from sd3_adrpo.option_help import option_help

ROOT = Path(__file__).parent.parent


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def error(capsys: pytest.CaptureFixture, *argv: str) -> str:
    """What parsing prints when it stops with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        cli.parse(list(argv))
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.fixture
def builtin(tiny_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The built-in model and CLIP replaced by tiny ones, so that these tests need no trained weights."""
    write(tmp_path / "open_clip_config.json", "{}")
    monkeypatch.setattr(shapes, "PIPELINE_DIR", tiny_sd3)
    monkeypatch.setattr(shapes, "CLIP_DIR", tmp_path)
    return tmp_path


def test_precedence(tmp_path: Path) -> None:
    """Defaults < preset < file < command line: beta2 is only a default, rank a preset's, epochs and rate the file's."""
    file = write(tmp_path / "my.yaml", "epochs: 7\ntrain: {learning_rate: 1e-5, sigmas_per_sample: 5}\n")
    config = cli.parse(["--config", file, "--train.learning_rate=3e-5"])
    assert config.train.adam_beta2 == 0.999
    assert config.lora.rank == 16 and config.train.mixed_precision == "no"
    assert config.epochs == 7 and config.train.sigmas_per_sample == 5
    assert config.train.learning_rate == 3e-5
    second = write(tmp_path / "second.yaml", "epochs: 9\n")
    assert cli.parse(["--config", file, "--config", second]).epochs == 9


def test_a_run_that_goes_on_has_its_own_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run's own < file < command line, and no preset; nothing of it where the run cannot be found."""
    monkeypatch.chdir(tmp_path)
    state = tmp_path / "runs" / "mine" / "checkpoints" / "epoch-0001" / "state.pt"
    state.parent.mkdir(parents=True)
    state.touch()
    first = cli.parse("--config study --objective dpo --seed 5 --reward clip=1,jpeg --reward.jpeg.target 3".split())
    write(tmp_path / "runs" / "mine" / "config.yaml", cli.dump(first))
    for path in ("latest", "runs/mine", str(state.parent)):
        again = cli.parse(["--resume_from_checkpoint", path])
        assert again.resume_from_checkpoint == path
        assert dataclasses.replace(again, resume_from_checkpoint=None) == first
    file = write(tmp_path / "my.yaml", "epochs: 7\nseed: 3\n")
    longer = cli.parse(["--resume_from_checkpoint", "latest", "--config", file, "--epochs", "9"])
    assert (longer.epochs, longer.seed, longer.objective) == (9, 3, first.objective)
    assert cli.parse(["--resume_from_checkpoint", "runs/other"]).objective.name == "adrpo"  # plan.check refuses it


@pytest.mark.parametrize("name", cli.presets())
def test_every_preset_parses(name: str) -> None:
    config = cli.parse(["--config", name])
    model_preset = cli.preset_for(config.model)
    if name == "study":  # on top of any model's
        assert config.model == "shapes" and config.rollout.samples_per_prompt == 16 and config.epochs == 3
        assert cli.parse(["--config", name, "--model", "some-sd3.5"]).lora == cli.parse(["--model", "some-sd3.5"]).lora
        return
    assert name.startswith(model_preset)  # one for a card is its model's with other batches
    assert name != model_preset or cli.parse(["--model", config.model]) == config


def test_preset_follows_the_model(tmp_path: Path) -> None:
    config = cli.parse(["--model", "someone/stable-diffusion-3.5-medium"])
    assert (config.reward.model, config.reward.pretrained) == ("ViT-H-14", "laion2b_s32b_b79k")
    assert (config.lora.rank, config.rollout.height) == (32, 512)
    file = write(tmp_path / "my.yaml", "model: someone/else\n")
    assert cli.parse(["--config", file]).reward.model == "ViT-H-14"
    assert cli.parse(["--config", file, "--model", "shapes"]).rollout.height == 64
    assert cli.parse(["--config", "shapes", "--model", "someone/else"]).rollout.height == 64


def test_objective_by_name(tmp_path: Path) -> None:
    short = cli.parse(["--config", write(tmp_path / "a.yaml", "objective: adrpo\n")])
    long = cli.parse(["--config", write(tmp_path / "b.yaml", "objective: {name: adrpo, beta0: 2}\n")])
    assert (short.objective.beta0, long.objective.beta0) == (0.5, 2.0)  # the preset's, the file's
    assert cli.parse(["--objective", "adrpo", "--objective.beta0", "0.5"]).objective.beta0 == 0.5


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--epoch", "3"], "unknown option --epoch; did you mean --epochs?"),
        (["--train.learning_rat", "1"], "did you mean --train.learning_rate?"),
        (["--rank", "8"], "did you mean --lora.rank?"),
        (["--batch-size", "8"], "did you mean --rollout.batch_size or --train.batch_size or --eval.batch_size?"),
        (["--objective", "adrop"], "unknown objective 'adrop'; available: adrpo"),
        (["--reward=clop"], "unknown reward 'clop'; available: aesthetic, clip"),
        (["--epochs", "many"], "epochs is 'many'; it must be int"),
        (["--train.learning_rate", "fast"], "train.learning_rate is 'fast'; it must be float"),
        (["--rollout.solver", "hean"], "it must be one of euler, heun, midpoint; did you mean heun?"),
        (["--objective.beta0", "-1"], "objective.beta0 is -1.0; it must be positive"),
        (["--config", "sd3.5-medum"], "did you mean sd3.5-medium?"),
        (["--epochs"], "expected one argument"),
        (["stray"], "unrecognized arguments: stray"),
    ],
)
def test_bad_command_line(argv: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert message in error(capsys, *argv)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", "unknown option 'epoch'; did you mean epochs?"),
        ("rollout: {heigt: 3}", "unknown option 'rollout.heigt'; did you mean rollout.height?"),
        ("rollot: {height: 3}", "did you mean rollout.height?"),
        ("epochs: many", "epochs is 'many'; it must be int"),
        ("rollout: 3", "rollout is 3; it must map options to values"),
        ("objective: dpo2", "unknown objective 'dpo2'"),
        ("- epochs", "holds a list"),
        ("epochs: [", "cannot be read"),
    ],
)
def test_bad_file(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = write(tmp_path / "bad.yaml", text)
    printed = error(capsys, "--config", file)
    assert message in printed and file in printed


def test_dump_round_trip(tmp_path: Path) -> None:
    argv = ["--model", "a/b", "--lora.target_modules", "[attn.to_q, attn.to_v]", "--train.adam_epsilon", "1e-9"]
    config = cli.parse([*argv, "--prompts", "naïve: yes.csv", "--train.gradient_checkpointing", "--seed", "3"])
    assert config.train.gradient_checkpointing and config.lora.target_modules == ["attn.to_q", "attn.to_v"]
    assert cli.parse(["--config", write(tmp_path / "run.yaml", cli.dump(config))]) == config


def test_help_explains_every_option(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.parse(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert re.search(r"--train\.batch_size N +samples per forward pass, each with", text)
    assert re.search(r"--lora\.target_modules .*\n? +names of linear layers, matched by ending", text)
    for cls in (Config, RolloutConfig, TrainConfig, LoraConfig, EvalConfig, Adrpo):
        comments = option_help(cls)
        assert [field.name for field in dataclasses.fields(cls) if len(comments.get(field.name, "")) < 6] == []


def test_dry_run_loads_no_model(builtin: Path, tiny_sd3: Path) -> None:
    """In a process of its own: 7 x 3 prompts are 21, so 17 to train on and 4 to test with; 128 x 8 images an epoch."""
    prompts = write(builtin / "mine.csv", "Prompts,Category\n" + "".join(f"cat {i},c{i % 3}\n" for i in range(21)))
    code = (
        "import pathlib, sys, train_sd3\nfrom sd3_adrpo import shapes\n"
        f"shapes.PIPELINE_DIR, shapes.CLIP_DIR = pathlib.Path({str(tiny_sd3)!r}), pathlib.Path({str(builtin)!r})\n"
        f"code = train_sd3.main(['--prompts', {prompts!r}, '--dry_run'])\n"
        "assert not {'diffusers', 'transformers', 'open_clip', 'peft'} & sys.modules.keys()\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert "17 prompts, the rest of" in done.stdout and "4 prompts, held out of" in done.stdout
    assert "2048 images (128 prompts x 16)" in done.stdout


def test_missing_prompt_file() -> None:
    """One message, exit code 1, no traceback, and no folder left behind."""
    command = [sys.executable, "train_sd3.py", "--prompts", "nowhere.csv", "--output_dir", "runs/never"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("train_sd3.py: error: prompt file nowhere.csv: no such file")
    assert "Traceback" not in done.stderr and not (ROOT / "runs/never").exists()


def test_every_program_says_its_own_name(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Of a bad option (2) and of an error that the user can mend (1)."""
    from sd3_adrpo import sample
    from sd3_adrpo.export import __main__ as export

    name = "python -m sd3_adrpo.sample"
    with pytest.raises(SystemExit) as stop:
        sample.main(["a cat", "--height", "tall"])
    assert stop.value.code == 2 and capsys.readouterr().err.startswith(f"{name}: error: command line: rollout.height")
    assert sample.main([""]) == 1
    assert capsys.readouterr().err == f"{name}: error: a prompt is empty; write what the picture should show\n"
    assert export.main([str(tmp_path), "--merge", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("python -m sd3_adrpo.export: error: ")


def test_prompts_of_the_built_in_world() -> None:
    train, test, description = prompt_choice.resolve_prompts(cli.parse([]))
    assert description["train"]["file"].endswith("shapes_rl.csv") and description["train"]["prompts"] == len(train)
    assert description["test"]["file"].endswith("shapes_test.csv") and description["test"]["also_trained_on"] == 0
    assert sum(description["test"]["categories"].values()) == len(test)


def test_prompts_of_the_user(tmp_path: Path) -> None:
    """The user's own are split, the same way for every training seed; shipped files are found by their name."""
    file = write(tmp_path / "mine.txt", "".join(f"a cat {i}\n" for i in range(20)))
    train, test, description = prompt_choice.resolve_prompts(cli.parse(["--prompts", file]))
    assert (len(train), len(test)) == (16, 4) and not {p.text for p in train} & {p.text for p in test}
    assert description["test"]["part"] == "held out"
    assert prompt_choice.resolve_prompts(cli.parse(["--prompts", file, "--seed", "5"]))[1] == test
    given = prompt_choice.resolve_prompts(cli.parse(["--prompts", file, "--test_prompts", "raft_style.txt"]))
    assert len(given[0]) == 20 and given[2]["test"]["file"].endswith("raft_style.txt")
    few = prompt_choice.resolve_prompts(cli.parse(["--prompts", write(tmp_path / "few.txt", "a\nb\n")]))
    assert few[0] == few[1] and few[2]["test"]["also_trained_on"] == 2


def test_plan_counts(builtin: Path) -> None:
    """3 x 4 images, 2 an update: 6 updates a pass, 2 passes. Heun with guidance: 5 steps x 2 x 2 = 20 passes."""
    rollout = ["--rollout.prompts_per_epoch=3", "--rollout.samples_per_prompt=4", "--rollout.num_inference_steps=5"]
    rollout += ["--rollout.solver=heun", "--rollout.guidance_scale=4"]
    train = ["--train.batch_size=1", "--train.gradient_accumulation_steps=2", "--train.inner_epochs=2"]
    text = str(plan.check(cli.parse([*rollout, *train, "--train.sigmas_per_sample=3"])))
    text = " ".join(text.split())
    assert "12 images (3 prompts x 4) of 64 x 64, 12 updates" in text
    assert "20 to sample, 6 for the reference, 6 with backward" in text
    raft = ["--objective=raft", "--objective.keep=1", "--train.sigmas_per_sample=3"]  # the best of each prompt's 4
    text = " ".join(str(plan.check(cli.parse([*rollout, *train, *raft]))).split())
    assert "12 images (3 prompts x 4) of 64 x 64, 4 updates" in text and "of the 3 trained on" in text


def test_lora_parameters_are_peft_s(builtin: Path) -> None:
    import peft
    from diffusers import SD3Transformer2DModel

    config = cli.parse([])
    transformer = SD3Transformer2DModel.from_pretrained(shapes.PIPELINE_DIR, subfolder="transformer")
    transformer.add_adapter(peft.LoraConfig(r=config.lora.rank, target_modules=config.lora.target_modules))
    expected = sum(p.numel() for name, p in transformer.named_parameters() if "lora_" in name)
    planned = plan.check(config)
    assert planned.model.lora_parameters(config.lora.target_modules, config.lora.rank) == expected
    bare = SD3Transformer2DModel.from_pretrained(shapes.PIPELINE_DIR, subfolder="transformer")
    assert planned.model.parameters["transformer"] == sum(value.numel() for value in bare.state_dict().values())


def test_plan_refuses(builtin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*argv: str) -> str:
        with pytest.raises(UserError) as caught:
            plan.check(cli.parse(list(argv)))
        return str(caught.value)

    (tmp_path / "full").mkdir()
    write(tmp_path / "full" / "kept.txt", "kept")
    assert "is not empty" in refused("--output_dir", str(tmp_path / "full"))
    assert "train.batch_size is 0; it must be positive" in refused("--train.batch_size", "0")
    assert "no layer of shapes ends in 'attn.to_z'" in refused("--lora.target_modules", "[attn.to_z]")
    assert "is no folder here" in refused("--model", "./nowhere")
    assert "samples an SDE without guidance" in refused("--objective", "flow_grpo", "--rollout.guidance_scale", "2")
    assert "it must be at least 2" in refused("--objective", "dpo", "--rollout.samples_per_prompt", "1")
    assert "compile is for a LoRA" in refused("--compile", "--finetune", "full")
    own = write(tmp_path / "own.txt", "a cat\n")
    assert "nothing that it could listen to" in refused("--alarm", "stop", "--prompts", own)
    plan.check(cli.parse(["--alarm", "stop", "--prompts", own, "--watch", "jpeg"]))
    assert "has no model_index.json" in refused("--model", str(tmp_path / "full"))
    monkeypatch.setattr(shapes, "CLIP_DIR", tmp_path / "nowhere")
    assert "built-in CLIP's weights are not in" in refused()
    monkeypatch.setattr(shapes, "PIPELINE_DIR", tmp_path / "nowhere")
    assert "built-in model's weights are not in" in refused()


def test_truncated_weights(tiny_sd3: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "cut"
    shutil.copytree(tiny_sd3, folder)
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="is truncated"):
        plan.check(cli.parse(["--model", str(folder)]))
    file.write_bytes(b"\x00")
    with pytest.raises(UserError, match="is damaged"):
        plan.check(cli.parse(["--model", str(folder)]))


def test_main_returns_codes(builtin: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert train_sd3.main(["--dry_run"]) == 0
    assert "prompts" in capsys.readouterr().out
    write(tmp_path / "empty.csv", "")
    assert train_sd3.main(["--dry_run", "--prompts", str(tmp_path / "empty.csv")]) == 1
    assert "it is empty" in capsys.readouterr().err


def test_a_file_may_tune_each_objective(tmp_path):
    """Under `objectives` a file gives options that count for one objective only; the command line still wins."""
    path = tmp_path / "tuned.yaml"
    path.write_text(
        "model: shapes\nepochs: 7\nobjectives:\n  raft: {train.learning_rate: 5.0e-4, objective.keep: 3}\n"
        "  dpo: {objective.beta: 10}\n"
    )
    raft = cli.parse(["--config", str(path), "--objective", "raft"])
    assert (raft.train.learning_rate, raft.objective.keep, raft.epochs) == (5e-4, 3, 7)
    assert cli.parse(["--config", str(path), "--objective", "dpo"]).objective.beta == 10
    default = cli.parse(["--config", str(path)])
    assert default.train.learning_rate != 5e-4 and default.objective.name == "adrpo"
    assert cli.parse(["--config", str(path), "--objective", "raft", "--objective.keep", "2"]).objective.keep == 2
    path.write_text("objectives:\n  raft: {objective.kep: 3}\n")
    with pytest.raises(SystemExit):
        cli.parse(["--config", str(path), "--objective", "raft"])
