"""models/sd3.py against the stock pipeline, part by part and for a whole sampling run."""

from __future__ import annotations

import logging

import pytest
import tiny
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from sd3_adrpo import flow
from sd3_adrpo.errors import UserError
from sd3_adrpo.models import sd3, sources
from sd3_adrpo.models.sd3 import SD3
from sd3_adrpo.rollout import sample

NO_T5 = {"text_encoder_3": None, "tokenizer_3": None}


@pytest.fixture(scope="module", params=["sd35", "sd3"])
def both(request, tiny_sd35, tiny_sd3) -> tuple[SD3, StableDiffusion3Pipeline]:
    """(our model, an untouched stock pipeline), with and without T5."""
    folder, absent = (tiny_sd35, {}) if request.param == "sd35" else (tiny_sd3, NO_T5)
    stock = StableDiffusion3Pipeline.from_pretrained(folder, **absent)
    stock.set_progress_bar_config(disable=True)
    return SD3.load(str(folder), max_sequence_length=tiny.SEQUENCE), stock


@torch.no_grad()
def test_encode_equals_stock(both):
    model, stock = both
    embeds, _, pooled, _ = stock.encode_prompt(
        tiny.PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=tiny.SEQUENCE
    )
    condition = model.encode(tiny.PROMPTS, batch_size=2)  # a last batch of one
    assert condition.repeats == (1 if model.has_t5 else tiny.SEQUENCE)
    condition = tiny.unfolded(condition)
    assert condition.embeds.shape == (3, tiny.CLIP_LENGTH + tiny.SEQUENCE, tiny.JOINT)
    assert condition.pooled.shape == (3, sum(tiny.WIDTHS))
    torch.testing.assert_close(condition.embeds, embeds, atol=1e-6, rtol=0)
    torch.testing.assert_close(condition.pooled, pooled, atol=1e-6, rtol=0)
    assert (condition.embeds[0] - condition.embeds[1]).abs().max() > 0.1  # the prompts differ at all


def test_t5_is_used_where_it_is(both):
    model, stock = both
    tokens = model.encode(tiny.PROMPTS[:1]).embeds[0, tiny.CLIP_LENGTH :]
    assert model.has_t5 == (stock.text_encoder_3 is not None) == bool(tokens.abs().max() > 0)


@torch.no_grad()
def test_velocity_equals_transformer(both):
    model, stock = both
    condition = model.encode(tiny.PROMPTS)
    noisy, sigma = torch.randn(3, 16, 8, 8), torch.tensor([0.0089, 0.5, 1.0])
    written_out = tiny.unfolded(condition)
    expected = stock.transformer(
        hidden_states=noisy,
        timestep=torch.tensor([8.9, 500.0, 1000.0]),
        encoder_hidden_states=written_out.embeds,
        pooled_projections=written_out.pooled,
    ).sample
    velocity = model.velocity(noisy, sigma, condition)
    torch.testing.assert_close(velocity, expected, atol=1e-5, rtol=0)
    whole = model.velocity(noisy, torch.tensor([0.008, 0.5, 1.0]), condition)  # what rounding to whole times would give
    assert (velocity - whole)[0].abs().max() > 1e-4
    other = model.velocity(noisy, sigma, written_out, transformer=stock.transformer)
    torch.testing.assert_close(other, expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_decode_equals_stock_postprocessing(both):
    model, stock = both
    clean = torch.randn(3, 16, 8, 8) * 2
    raw = stock.vae.decode(clean / stock.vae.config.scaling_factor + stock.vae.config.shift_factor).sample
    expected = stock.image_processor.postprocess(raw, output_type="pt")
    images = model.decode(clean, batch_size=2)
    assert images.shape == (3, 3, 64, 64) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_rollout_equals_stock_pipeline_on_its_grid(both, guidance_scale):
    model, stock = both
    seeds = [3, 4, 5]
    latents = stock(
        tiny.PROMPTS,
        num_inference_steps=6,
        guidance_scale=guidance_scale,
        height=tiny.SIZE,
        width=tiny.SIZE,
        max_sequence_length=tiny.SEQUENCE,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
    ).images
    ours = sample(
        model,
        model.encode(tiny.PROMPTS),
        torch.arange(3),
        seeds,
        stock.scheduler.sigmas,
        model.latent_shape(tiny.SIZE, tiny.SIZE),
        guidance_scale=guidance_scale,
        negative=model.encode([""]),
        batch_size=2,
    )
    torch.testing.assert_close(ours, latents, atol=1e-5, rtol=0)
    assert (ours - flow.seeded_noise(seeds, (16, 8, 8))).abs().max() > 0.1


def test_cut_prompts_give_one_warning_and_no_other(tiny_sd35, caplog):
    model = SD3.load(str(tiny_sd35), max_sequence_length=tiny.SEQUENCE)
    with caplog.at_level(logging.WARNING):
        for name in sources.TRUNCATION_LOGGERS:  # those libraries do not propagate to the root, where caplog listens
            logging.getLogger(name).addHandler(caplog.handler)
        try:
            model.encode(["a cat", tiny.LONG, tiny.LONG + "!"], batch_size=1)
        finally:
            for name in sources.TRUNCATION_LOGGERS:
                logging.getLogger(name).removeHandler(caplog.handler)
    assert [record.name for record in caplog.records] == ["sd3_adrpo.models.sd3"]
    assert f"2 of 3 prompts are cut at the text encoder's {tiny.CLIP_LENGTH} tokens" in caplog.text
    caplog.clear()
    model.encode(["a cat"])
    assert not caplog.records


def test_dropped_text_encoders(tiny_sd35):
    model = SD3.load(str(tiny_sd35))
    model.drop_text_encoders()
    assert model.pipeline.text_encoder is None and model.pipeline.text_encoder_3 is None and model.has_t5
    with pytest.raises(RuntimeError, match="dropped"):
        model.encode(["a cat"])


def test_latent_shape(both):
    model, _ = both
    assert model.latent_shape(64, 96) == (16, 8, 12)
    with pytest.raises(UserError, match="height is 72.*multiple of 16"):
        model.latent_shape(72, 64)
    with pytest.raises(UserError, match="width is 112.*at most 96"):
        model.latent_shape(64, 112)


def test_sigmas_use_the_scheduler_shift(both):
    model, _ = both
    grid = model.sigmas(4, None, 64, 64)
    torch.testing.assert_close(grid, torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]))  # 3 t / (1 + 2 t) at t = 1, 3/4 ... 0
    torch.testing.assert_close(model.sigmas(4, 1.0, 64, 64), torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]))


def test_sigmas_with_dynamic_shift_equal_the_scheduler(tmp_path):
    folder = tiny.build(tmp_path, t5=False, dual=False, use_dynamic_shifting=True, base_image_seq_len=4)
    model, steps = SD3.load(str(folder)), 5
    stock = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    # 64 x 96 pixels: 8 x 12 latents, 24 tokens of 2 x 2
    mu = 0.5 + (1.15 - 0.5) * (24 - 4) / (4096 - 4)
    stock.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), mu=mu)
    torch.testing.assert_close(model.sigmas(steps, None, 64, 96), stock.sigmas, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("dtype", "vae"), [(torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)]
)
def test_dtypes(tiny_sd35, dtype, vae):
    model = SD3.load(str(tiny_sd35), dtype=dtype)
    assert model.dtype == model.transformer.proj_out.weight.dtype == dtype
    assert model.pipeline.text_encoder_3.dtype == dtype and model.vae.dtype == vae
    assert not any(parameter.requires_grad for parameter in model.transformer.parameters())
    assert model.decode(torch.zeros(1, 16, 8, 8)).dtype == torch.float32


@torch.no_grad()
def test_bf16_velocity_is_near_fp32(tiny_sd35):
    exact, rounded = SD3.load(str(tiny_sd35)), SD3.load(str(tiny_sd35), dtype=torch.bfloat16)
    noisy, sigma = torch.randn(3, 16, 8, 8), torch.tensor([0.1, 0.5, 0.9])
    expected = exact.velocity(noisy, sigma, exact.encode(tiny.PROMPTS))
    velocity = rounded.velocity(noisy, sigma, rounded.encode(tiny.PROMPTS))
    assert velocity.dtype == torch.bfloat16
    error = (velocity.float() - expected).square().mean() / expected.square().mean()
    assert 0 < error < 1e-3


def test_wrong_local_models(tmp_path, tiny_sd35):
    with pytest.raises(UserError, match="no folder here"):
        SD3.load("./nowhere/at/all")
    with pytest.raises(UserError, match="no model_index.json"):
        SD3.load(str(tmp_path))
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    with pytest.raises(UserError, match="holds a StableDiffusionXLPipeline"):
        SD3.load(str(tmp_path))
    with pytest.raises(UserError, match="is a file"):
        SD3.load(str(tmp_path / "model_index.json"))


def test_damaged_weights_are_named(tmp_path):
    folder = tiny.build(tmp_path, t5=False, dual=False)
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="missing or damaged"):
        SD3.load(str(folder))


def test_offline_hub_model():
    with pytest.raises(UserError, match="hub cannot be reached.*hf download someone/no-such-model"):
        SD3.load("someone/no-such-model")


@pytest.mark.parametrize(
    ("kind", "remedy"), [(GatedRepoError, "accept its licence"), (RepositoryNotFoundError, "check")]
)
def test_hub_errors_are_explained(monkeypatch, kind, remedy):
    def refuse(*args, **kwargs):
        try:
            raise kind.__new__(kind)  # as the hub's client raises it, without its response
        except RepositoryNotFoundError:
            raise OSError("reworded, as diffusers does")  # noqa: B904

    monkeypatch.setattr(sd3.StableDiffusion3Pipeline, "load_config", refuse)
    with pytest.raises(UserError, match=f"someone/model.*{remedy}.*hf auth login"):
        SD3.load("someone/model")
