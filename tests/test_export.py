"""The exported LoRA in stock diffusers: same velocities, full strength, no trace after unloading; clear errors."""

from __future__ import annotations

import json
import os

import peft
import pytest
import tiny
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sd3_adrpo.errors import UserError
from sd3_adrpo.export import (
    ExportError,
    check_lora,
    lora,
    model_card,
    save_comfyui,
    save_lora,
    stock_pipeline,
    verify_lora,
)
from sd3_adrpo.models.sd3 import SD3
from sd3_adrpo.types import Condition

# a top-level layer, the second attention of SD3.5, a feed-forward and a modulation layer beside the usual ones
TARGETS = ["attn.to_q", "attn.to_out.0", "attn.add_k_proj", "attn2.to_v", "ff.net.0.proj", "norm1.linear", "proj_out"]


def add_lora(transformer, rank: int = 4, alpha: float = 10.0, targets: list[str] = TARGETS, seed: int = 1) -> None:
    """A LoRA of random weights, alpha != rank, large enough to show."""
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=targets)
    transformer.add_adapter(config, adapter_name="policy")
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in transformer.named_parameters():
        if ".policy." in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)  # float32 in every model


def inputs(model: SD3):
    return lora._random_inputs(model, batch=3, seed=7)


@pytest.fixture
def trained(tiny_sd35) -> SD3:
    model = SD3.load(str(tiny_sd35), max_sequence_length=tiny.SEQUENCE)
    add_lora(model.transformer)
    return model


@torch.no_grad()
def test_stock_pipeline_reproduces_velocities_and_unloads(trained, tiny_sd35, tmp_path):
    save_lora(trained.transformer, tmp_path)
    stock = StableDiffusion3Pipeline.from_pretrained(tiny_sd35)
    noisy, sigma, condition = inputs(trained)
    base = trained.velocity(noisy, sigma, condition, transformer=stock.transformer)
    policy = trained.velocity(noisy, sigma, condition)
    assert (policy - base).abs().max() > 1e-2  # the LoRA does something
    stock.load_lora_weights(tmp_path)
    loaded = trained.velocity(noisy, sigma, condition, transformer=stock.transformer)
    torch.testing.assert_close(loaded, policy, atol=1e-5, rtol=0)
    stock.unload_lora_weights()
    assert torch.equal(trained.velocity(noisy, sigma, condition, transformer=stock.transformer), base)


@torch.no_grad()
def test_velocities_at_real_prompts_without_t5(tiny_sd3, tmp_path):
    """The trainer's own path, one token for all of T5's zeros, against stock diffusers that attends to each."""
    model = SD3.load(str(tiny_sd3), max_sequence_length=tiny.SEQUENCE)
    add_lora(model.transformer)
    save_lora(model.transformer, tmp_path)
    stock = StableDiffusion3Pipeline.from_pretrained(tiny_sd3, text_encoder_3=None, tokenizer_3=None)
    stock.load_lora_weights(tmp_path)
    noisy, sigma, _ = inputs(model)
    condition = model.encode(tiny.PROMPTS)
    assert condition.repeats == tiny.SEQUENCE
    embeds, _, pooled, _ = stock.encode_prompt(
        tiny.PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=tiny.SEQUENCE
    )
    loaded = model.velocity(noisy, sigma, Condition(embeds, pooled), transformer=stock.transformer)
    torch.testing.assert_close(model.velocity(noisy, sigma, condition), loaded, atol=1e-5, rtol=0)


def test_lora_changes_images_of_the_stock_pipeline(trained, tiny_sd35, tmp_path):
    save_lora(trained.transformer, tmp_path)
    stock = StableDiffusion3Pipeline.from_pretrained(tiny_sd35)
    stock.set_progress_bar_config(disable=True)

    def image() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return stock("a cat", num_inference_steps=2, height=64, width=64, generator=generator, output_type="pt").images

    before = image()
    stock.load_lora_weights(tmp_path)
    assert (image() - before).abs().max() > 1e-3
    stock.unload_lora_weights()
    assert torch.equal(image(), before)


def test_file_has_alpha_baked_in_and_diffusers_names(trained, tmp_path):
    path = save_lora(trained.transformer, tmp_path)
    assert os.listdir(tmp_path) == ["pytorch_lora_weights.safetensors"]  # nothing partial stays
    weights = load_file(path)
    layer = trained.transformer.transformer_blocks[0].attn.to_q
    up = weights["transformer.transformer_blocks.0.attn.to_q.lora_B.weight"]
    torch.testing.assert_close(up, layer.lora_B["policy"].weight.detach() * 2.5)  # alpha / rank = 10 / 4
    down = weights["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"]
    assert torch.equal(down, layer.lora_A["policy"].weight)
    assert "transformer.transformer_blocks.0.attn2.to_v.lora_A.weight" in weights
    assert all(key.startswith("transformer.") and ".alpha" not in key for key in weights)
    with safe_open(path, framework="pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert metadata["transformer.r"] == metadata["transformer.lora_alpha"] == 4


def test_files_can_be_read_by_whom_the_umask_lets(trained, tmp_path):
    before = os.umask(0o027)
    try:
        made = save_lora(trained.transformer, tmp_path / "lora")
        converted = save_comfyui(made, tmp_path / "comfyui" / "one.safetensors")
    finally:
        os.umask(before)
    assert [oct(path.stat().st_mode & 0o777) for path in (made, converted)] == ["0o640"] * 2
    assert [path.name for path in converted.parent.iterdir()] == ["one.safetensors"]


def test_failed_save_keeps_the_previous_file(trained, tmp_path, monkeypatch):
    before = save_lora(trained.transformer, tmp_path).read_bytes()

    def fail(folder, **kwargs):
        (lora.Path(folder) / lora.WEIGHTS).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(lora.StableDiffusion3Pipeline, "save_lora_weights", fail)
    with pytest.raises(OSError, match="disk full"):
        save_lora(trained.transformer, tmp_path)
    assert (tmp_path / lora.WEIGHTS).read_bytes() == before and len(os.listdir(tmp_path)) == 1


def test_verify_returns_the_difference_and_leaves_the_policy_alone(trained, tmp_path):
    save_lora(trained.transformer, tmp_path)
    trained.drop_text_encoders()  # as they are by the end of a run
    before = {name: (value.clone(), value.requires_grad) for name, value in trained.transformer.named_parameters()}
    assert 0 <= verify_lora(tmp_path, trained, trained.velocity) <= 1e-5
    after = dict(trained.transformer.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, (value, _) in before.items())
    assert all(after[name].requires_grad == grad for name, (_, grad) in before.items())
    assert trained.transformer.active_adapters() == ["policy"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_verify_in_low_precision(tiny_sd35, tmp_path, dtype):
    model = SD3.load(str(tiny_sd35), dtype=dtype)
    add_lora(model.transformer)
    save_lora(model.transformer, tmp_path)
    assert verify_lora(tmp_path, model, model.velocity) < lora.TOLERANCE[dtype]
    _scale_up_factors(tmp_path, 1.1)  # a wrong strength that rounding of velocities could hide
    with pytest.raises(ExportError, match="strength"):
        verify_lora(tmp_path, model, model.velocity)


def _scale_up_factors(folder, factor: float) -> None:
    path = folder / lora.WEIGHTS
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    weights = load_file(path)
    save_file({key: value * (factor if "lora_B" in key else 1) for key, value in weights.items()}, path, metadata)


def test_verify_finds_wrong_strength_lost_layers_and_another_policy(trained, tmp_path):
    save_lora(trained.transformer, tmp_path)
    with pytest.raises(ExportError, match="does not reproduce"):  # a trainer that asks the reference by mistake
        verify_lora(tmp_path, trained, lambda *args: trained.velocity(*args) + 1e-3)
    _scale_up_factors(tmp_path, 1.001)
    with pytest.raises(ExportError, match="strength"):
        verify_lora(tmp_path, trained, trained.velocity)
    save_lora(trained.transformer, tmp_path)
    weights = load_file(tmp_path / lora.WEIGHTS)
    save_file({key: value for key, value in weights.items() if "attn2" not in key}, tmp_path / lora.WEIGHTS)
    with pytest.raises(ExportError, match="1 LoRA layers are lost.*attn2"):
        verify_lora(tmp_path, trained, trained.velocity)


def test_stock_pipeline_shares_the_base(trained):
    other = stock_pipeline(trained).transformer
    ours = {name.replace(".base_layer", ""): value for name, value in trained.transformer.named_parameters()}
    theirs = dict(other.named_parameters())
    assert theirs and all(value.data_ptr() == ours[name].data_ptr() for name, value in theirs.items())
    assert not any("lora" in name for name in theirs)


def test_check_accepts_a_folder_a_file_and_a_transformer_with_adapters(trained, tmp_path):
    path = save_lora(trained.transformer, tmp_path)
    assert check_lora(tmp_path, tiny.transformer()) == path
    assert check_lora(str(path), trained.transformer) == path


def test_lora_of_another_model(trained, tmp_path):
    save_lora(trained.transformer, tmp_path)
    with pytest.raises(ExportError, match=r"another model: .*is \(\d+, \d+\) here and \(\d+, \d+\) there"):
        check_lora(tmp_path, tiny.transformer(heads=3))  # wider
    with pytest.raises(ExportError, match="another model: 2 misfits in .*attn2.to_v does not exist"):
        check_lora(tmp_path, tiny.transformer(dual=False))  # no second attention, as SD3-medium


@pytest.mark.parametrize("prefix", ["diffusion_model.", "lora_unet_", "base_model.model."])
def test_foreign_names_that_diffusers_would_load_as_nothing(trained, tmp_path, prefix):
    weights = load_file(save_lora(trained.transformer, tmp_path))
    path = tmp_path / "foreign.safetensors"
    save_file({prefix + key.removeprefix("transformer."): value for key, value in weights.items()}, path)
    with pytest.raises(ExportError, match=f"0 of {len(weights)} do, e.g. {prefix}"):
        check_lora(path, trained.transformer)


def test_alpha_tensors_and_half_pairs(trained, tmp_path):
    weights = load_file(save_lora(trained.transformer, tmp_path))
    path = tmp_path / "odd.safetensors"
    save_file({**weights, "transformer.proj_out.alpha": torch.tensor(4.0)}, path)
    with pytest.raises(ExportError, match="proj_out.alpha is no lora_A or lora_B"):
        check_lora(path, trained.transformer)
    weights.pop("transformer.proj_out.lora_B.weight")
    save_file(weights, path)
    with pytest.raises(ExportError, match="proj_out has one LoRA factor of two"):
        check_lora(path, trained.transformer)


@pytest.mark.parametrize("keep", [0, 5, 500, -1])
def test_truncated_file(trained, tmp_path, keep):
    path = save_lora(trained.transformer, tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ExportError, match="truncated"):
        check_lora(tmp_path, trained.transformer)


def test_missing_lora(trained, tmp_path):
    with pytest.raises(UserError, match="no LoRA at"):
        check_lora(tmp_path, trained.transformer)
    with pytest.raises(ExportError, match="no LoRA named 'ema'"):
        save_lora(trained.transformer, tmp_path, adapter_name="ema")


SUMMARY = {
    "objective": "adrpo",
    "seed": 0,
    "epochs": 3,
    "before": {"reward": 27.0, "accuracy": None, "clip_diversity": 0.25, "w2_drift": 0.0, "free_diversity": None},
    "after": {"reward": 30.5, "accuracy": None, "clip_diversity": 0.24, "w2_drift": 0.003, "free_diversity": None},
    "difference": {
        "reward": {"mean": 3.5, "stderr": 0.2},
        "accuracy": None,
        "w2_drift": {"mean": 0.003, "stderr": None},
    },
}


def test_model_card():
    card = model_card(SUMMARY, base_model="owner/model", reward="CLIP", prompts="my.csv", sampling={"height": 64})
    assert "base_model: owner/model" in card and "- Training prompts: my.csv" in card and "- Objective: adrpo" in card
    assert "| reward | 27 | 30.5 | +3.5 ± 0.2 |" in card
    assert "| accuracy (all of the prompt drawn) | - | - | - |" in card
    assert 'pipeline("a prompt", height=64)' in card and "text_encoder_3" not in card
    built_in = model_card(SUMMARY, base_model="shapes", reward="CLIP", prompts="p.csv", t5=False)
    assert "from_pretrained(PIPELINE_DIR, text_encoder_3=None, tokenizer_3=None)" in built_in
    assert "base_model:" not in built_in


def test_example_of_the_model_card_runs(trained, tiny_sd35, tmp_path, monkeypatch):
    save_lora(trained.transformer, tmp_path)
    monkeypatch.chdir(tmp_path)
    sampling = {"num_inference_steps": 1, "guidance_scale": 1.0, "height": 64, "width": 64}
    card = model_card(SUMMARY, base_model=str(tiny_sd35), reward="CLIP", prompts="p.csv", sampling=sampling)
    code = card.split("```python\n")[1].split("```")[0].replace("FOLDER_OF_THIS_FILE", str(tmp_path))
    exec(code, {})
    assert (tmp_path / "image.png").stat().st_size > 0
