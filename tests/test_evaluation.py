"""Measurements pair what comes from the same noise; the command line evaluates an exported LoRA."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import types
import urllib.error
from pathlib import Path

import pytest
import torch
from PIL import Image

from sd3_adrpo.config import EvalConfig, LoraConfig
from sd3_adrpo.evaluation import METRICS, Measurement, by_sigma, compare, evaluate, measure, table
from sd3_adrpo.export import save_lora
from sd3_adrpo.models.sd3 import SD3
from sd3_adrpo.policy import Policy
from sd3_adrpo.prompts import Prompt

NAN = math.nan
PROMPTS = [Prompt("a red circle", "colours"), Prompt("a cat", "other"), Prompt("two blue squares", "colours")]
CONFIG = EvalConfig(samples_per_prompt=2, num_inference_steps=2, batch_size=4)
ROOT = Path(__file__).parent.parent


class Scorer:
    """Reward: 100 x the image's brightness."""

    unit, encoder = "brightness", "none"

    def embed_images(self, images):
        return images.float().flatten(1)

    def score(self, embeddings, prompts):
        return 100 * embeddings.mean(1)


@pytest.fixture
def model(tiny_sd3) -> SD3:
    return SD3.load(str(tiny_sd3), max_sequence_length=8)


def _policy(model: SD3, strength: float) -> Policy:
    policy = Policy(model, LoraConfig(rank=2, alpha=2, target_modules=["attn.to_q", "attn.to_out.0"]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.copy_(strength * torch.randn(parameter.shape, generator=generator))
    return policy


def test_untrained_lora_changes_nothing_and_a_trained_one_does(model):
    same = evaluate(_policy(model, 0.0), model, Scorer(), PROMPTS, CONFIG, 64, 64)
    assert torch.equal(same.before.images, same.after.images)
    summary = same.summary()
    assert summary["difference"]["reward"] == {"mean": 0.0, "stderr": 0.0}
    assert summary["before"]["w2_drift"] == summary["after"]["w2_drift"] == 0.0


def test_a_lora_is_compared_with_the_base_without_it(model):
    base = measure(None, model, Scorer(), PROMPTS, CONFIG, 64, 64)
    policy = _policy(model, 1.0)
    found = evaluate(policy, model, Scorer(), PROMPTS, CONFIG, 64, 64)
    assert torch.equal(found.before.images, base.images) and torch.equal(found.before.reward, base.reward)
    assert not torch.equal(found.after.images, base.images)
    assert (found.after.w2_drift > 0).all()
    at = found.summary()["by_sigma"]
    assert at["sigmas"] == [0.9, 0.7, 0.5, 0.3, 0.1]
    assert sum(value["mean"] for value in at["w2_drift"]) / 5 == pytest.approx(found.summary()["after"]["w2_drift"])
    assert len({value["mean"] for value in at["w2_drift"]}) == 5  # another at each
    assert found.before.by_sigma["velocity_norm_ratio"].eq(1).all()
    reused = evaluate(policy, model, Scorer(), PROMPTS, CONFIG, 64, 64, before=base)
    assert reused.before is base and torch.equal(reused.after.images, found.after.images)


def test_images_depend_on_prompt_and_number_only(model):
    whole = measure(None, model, Scorer(), PROMPTS, CONFIG, 64, 64)
    one = EvalConfig(samples_per_prompt=2, num_inference_steps=2, batch_size=1)
    alone = measure(None, model, Scorer(), PROMPTS[2:], one, 64, 64)
    assert (alone.reward - whole.reward[4:]).abs().max() < 1e-2
    assert not torch.equal(whole.images[4], whole.images[5])


def test_only_prompts_of_the_world_have_an_accuracy(model):
    found = measure(None, model, Scorer(), PROMPTS, CONFIG, 64, 64)
    assert found.accuracy.isnan().tolist() == [False, False, True, True, False, False]
    outside = measure(None, model, Scorer(), PROMPTS[1:2], CONFIG, 64, 64).summary()
    assert outside["accuracy"] is None and outside["free_diversity"] is None and outside["reward"] is not None


def _measurement(reward, accuracy, drift, clip, free, weight) -> Measurement:
    tensors = [torch.tensor(values) for values in (reward, accuracy, drift, clip, free, weight)]
    prompt, images = torch.tensor([0, 0, 1, 1]), torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    return Measurement(["p", "q"], ["x", None], prompt, images, *tensors)


def test_comparison_by_hand():
    before = _measurement([1.0, 3.0, 5.0, 7.0], [0.0, 1.0, NAN, NAN], [0.0] * 4, [0.5, 0.7], [NAN, 0.8], [NAN, 0.5])
    after = _measurement(
        [2.0, 4.0, 8.0, 10.0], [1.0, 1.0, NAN, NAN], [0.1, 0.1, 0.3, 0.3], [0.4, 0.4], [0.5, 0.9], [1.0, 1.0]
    )
    found = compare(before, after)
    assert list(found["before"]) == list(found["after"]) == list(found["difference"]) == list(METRICS)
    assert found["before"] == pytest.approx(
        {"reward": 4.0, "clip_diversity": 0.6, "w2_drift": 0.0, "accuracy": 0.5, "free_diversity": 0.8}
    )
    difference = found["difference"]
    assert difference["reward"] == pytest.approx({"mean": 2.0, "stderr": 1.0})  # prompts gained 1 and 3
    assert difference["w2_drift"] == pytest.approx({"mean": 0.2, "stderr": 0.1})
    assert difference["clip_diversity"] == pytest.approx({"mean": -0.2, "stderr": 0.1})
    assert difference["accuracy"] == {"mean": 0.5, "stderr": None}  # of one prompt
    assert difference["free_diversity"]["mean"] == pytest.approx(-0.1)  # (0.5 + 0.9) / 2 - 0.8
    assert found["by_sigma"] is None  # neither was measured by sigma
    after.by_sigma = {"w2_drift": torch.tensor([[1.0, 2.0], [1.0, 4.0], [3.0, 6.0], [3.0, 8.0]])}
    assert by_sigma(after)["w2_drift"] == [{"mean": 2.0, "stderr": 1.0}, {"mean": 5.0, "stderr": 2.0}]
    row = table(before, after)["x"]
    assert (row["prompts"], row["images"]) == (1, 2)
    assert row["reward"]["after"] == {"mean": 3.0, "stderr": None}
    assert row["reward"]["difference"] == {"mean": 1.0, "stderr": None}


def test_other_prompts_cannot_be_paired():
    one = _measurement([1.0] * 4, [NAN] * 4, [0.0] * 4, [0.5] * 2, [NAN] * 2, [NAN] * 2)
    other = Measurement(**{**vars(one), "prompts": ["p", "r"]})
    with pytest.raises(ValueError, match="cannot be paired"):
        compare(one, other)


@pytest.fixture
def command():
    spec = importlib.util.spec_from_file_location("evaluate_script", ROOT / "eval" / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def _arguments(tiny_sd3: Path, folder: Path) -> list[str]:
    (folder / "prompts.txt").write_text("a red circle\na cat\n")
    options = {"model": tiny_sd3, "prompts": folder / "prompts.txt", "output_dir": folder / "out", "height": 64}
    options |= {"width": 64, "samples_per_prompt": 2, "num_inference_steps": 2, "mixed_precision": "no"}
    options |= {"reward.model": "shapes", "reward.pretrained": "null", "max_sequence_length": 8}
    return [f"--{name}={value}" for name, value in options.items()]


def test_command_evaluates_an_exported_lora_like_the_policy(tiny_sd3, model, tmp_path, command, monkeypatch, capsys):
    monkeypatch.setattr("sd3_adrpo.rewards.clip.ClipReward.load", lambda *_: Scorer())
    policy = _policy(model, 1.0)
    save_lora(model.transformer, tmp_path / "lora")
    assert command([*_arguments(tiny_sd3, tmp_path), f"--lora={tmp_path / 'lora'}"]) == 0
    stored = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    config = EvalConfig(samples_per_prompt=2, num_inference_steps=2)
    expected = evaluate(policy, model, Scorer(), [Prompt("a red circle"), Prompt("a cat")], config, 64, 64).summary()
    for name in ("reward", "w2_drift", "clip_diversity"):
        assert stored["after"][name] == pytest.approx(expected["after"][name], rel=1e-3, abs=1e-5)
        assert stored["before"][name] == pytest.approx(expected["before"][name], rel=1e-3, abs=1e-5)
    assert stored["after"]["reward"] != stored["before"]["reward"]
    assert Image.open(tmp_path / "out" / "before_after.png").width > 500
    assert "reward is brightness" in capsys.readouterr().out
    assert command(_arguments(tiny_sd3, tmp_path)) == 1  # the result is not overwritten
    assert "holds an evaluation.json already" in capsys.readouterr().err


def test_command_measures_more_on_request(tiny_sd3, model, tmp_path, command, monkeypatch, capsys):
    monkeypatch.setattr("sd3_adrpo.rewards.clip.ClipReward.load", lambda *_: Scorer())
    _policy(model, 1.0)
    save_lora(model.transformer, tmp_path / "lora")
    arguments = [*_arguments(tiny_sd3, tmp_path), f"--lora={tmp_path / 'lora'}"]
    assert command([*arguments, "--metrics=vendi,velocity_norm_ratio,cmmd,recall"]) == 0
    stored = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert stored["before"]["velocity_norm_ratio"] == 1.0 != stored["after"]["velocity_norm_ratio"]
    assert 1 <= stored["before"]["vendi"] <= 2 and stored["difference"]["vendi"]["stderr"] is not None
    assert stored["distances"]["reference"] == "4 images of the base" and stored["distances"]["after"]["cmmd"] > 0
    samples = json.loads((tmp_path / "out" / "samples" / "samples.json").read_text())
    assert len(samples["after"]["vendi"]) == 2 and len(samples["after"]["velocity_norm_ratio"]) == 4
    capsys.readouterr()
    assert command([*arguments, f"--output_dir={tmp_path / 'new'}", "--metrics=vendy"]) == 1
    assert "'vendy' is not known" in capsys.readouterr().err


def test_command_measures_with_a_dino_of_a_folder(tiny_sd3, tmp_path, command, monkeypatch):
    from transformers import Dinov2Config, Dinov2Model

    monkeypatch.setattr("sd3_adrpo.rewards.clip.ClipReward.load", lambda *_: Scorer())
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=224, patch_size=14)
    Dinov2Model(config).save_pretrained(tmp_path / "dino")
    arguments = [*_arguments(tiny_sd3, tmp_path), "--metrics=dino_diversity", f"--dino_model={tmp_path / 'dino'}"]
    assert command(arguments) == 0
    stored = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert 0 < stored["before"]["dino_diversity"] < 1
    assert stored["categories"]["overall"]["dino_diversity"]["before"]["stderr"] > 0


class _NoWeights(types.ModuleType):
    """A package lpips whose AlexNet cannot be downloaded."""

    def LPIPS(self, **_):  # noqa: N802
        raise urllib.error.URLError("no route to host")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--metrics=dino_diversity", "--dino_model=nowhere"], "dino_diversity: nowhere does not load"),
        (["--metrics=lpips_diversity"], "no route to host>. Bring https://download.pytorch.org/"),
        (["--metrics=vendi"], "vendi needs image embeddings: give a CLIP by --embedder"),
        (["--metrics=cmmd", "--reference_images=pictures"], "b.png is no image"),
        (["--metrics=vendi", "--reference_images=pictures"], "is for the metrics cmmd, kid, fid"),
        (["--metrics=fid", "--prompts=one.txt", "--samples_per_prompt=1"], "fid compares sets of images"),
        (["--lora=nowhere"], "no LoRA at nowhere"),
        (["--reward=shapes"], "the reward shapes cannot judge 'a cat'"),
        (["--watch=shapes"], "the reward shapes cannot judge 'a cat'"),
        (["--reward.quality=0"], "quality is 0; it must be from 1 to 100"),
    ],
)
def test_what_is_missing_is_said_before_an_image_is_drawn(
    extra, message, tiny_sd3, tmp_path, command, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "lpips", _NoWeights("lpips"))
    monkeypatch.setattr("sd3_adrpo.evaluation.evaluate", lambda *_, **__: pytest.fail("an image was drawn"))
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save("pictures/a.png")
    (tmp_path / "pictures" / "b.png").write_text("no picture")
    (tmp_path / "one.txt").write_text("a red circle\n")
    arguments = [one for one in _arguments(tiny_sd3, tmp_path) if not one.startswith("--reward")]
    assert command([*arguments, *([] if "--reward=shapes" in extra else ["--reward=jpeg"]), *extra]) == 1
    assert message in capsys.readouterr().err


def test_diversity_does_not_depend_on_the_reward(model):
    class Plain:
        unit, encoder = "darkness", "none"

        def __call__(self, images, prompts):
            return -images.flatten(1).mean(1)

    assert measure(None, model, Plain(), PROMPTS, CONFIG, 64, 64).summary()["clip_diversity"] is None
    apart = measure(None, model, Plain(), PROMPTS, CONFIG, 64, 64, embedder=Scorer())
    together = measure(None, model, Scorer(), PROMPTS, CONFIG, 64, 64)
    torch.testing.assert_close(apart.clip_diversity, together.clip_diversity)
    assert (apart.reward < 0).all() and (together.reward > 0).all()


def test_command_without_a_lora_and_with_bad_input(tiny_sd3, tmp_path, command, monkeypatch, capsys):
    monkeypatch.setattr("sd3_adrpo.rewards.clip.ClipReward.load", lambda *_: Scorer())
    arguments = _arguments(tiny_sd3, tmp_path)
    assert command(arguments) == 0
    stored = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert stored["after"] is None and stored["difference"] is None and stored["before"]["w2_drift"] == 0.0
    assert (tmp_path / "out" / "grid.png").exists()
    again = [*arguments, f"--output_dir={tmp_path / 'other'}"]
    for extra, message in [
        (f"--lora={tmp_path / 'nowhere'}", "no LoRA at"),
        (f"--prompts={tmp_path / 'nowhere.txt'}", "no such file"),
        ("--height=60", "height is 60"),
        ("--samples_per_prompt=0", "must be at least 1"),
    ]:
        assert command([*again, extra]) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        command([*again, "--sample_per_prompt=3"])
    assert caught.value.code == 2
    assert "did you mean --samples_per_prompt?" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
