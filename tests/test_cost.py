"""Predicted work and memory: the published figures of SD3.5-medium, and counts of real passes."""

import json
from pathlib import Path

import pytest
import torch
from tiny import JOINT, WIDTHS, transformer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sd3_adrpo import cli, plan
from sd3_adrpo.cost import Tokens, _kept, decoder_flops, forward_flops, memory, tokens_of
from sd3_adrpo.errors import UserError
from sd3_adrpo.model_files import ModelFiles, inspect_model
from sd3_adrpo.models import published
from sd3_adrpo.models.sd3 import SD3
from sd3_adrpo.policy import Policy
from sd3_adrpo.types import Condition

SD35_MEDIUM = published.SD35_MEDIUM
PROMPTS = Path(__file__).parents[1] / "prompts" / "drawbench_style.csv"


def test_sd35_medium_at_512_and_1024_pixels():
    """By hand, w = 1536, N + T = 1229: 24 (24 w^2 1229 + 4 w 1229^2) + 13 (8 w^2 1024 + 4 w 1024^2) = 2.228e12."""
    assert forward_flops(SD35_MEDIUM, Tokens(1024, 205)) == pytest.approx(2.2286e12, rel=1e-3)
    assert forward_flops(SD35_MEDIUM, Tokens(4096, 205)) == pytest.approx(10.9e12, rel=0.03)


@pytest.mark.parametrize("name", ["stable-diffusion-3.5-medium", "stable-diffusion-3.5-large"])
def test_operations_at_true_size_equal_a_count(name):
    shape = published.TRANSFORMERS[f"stabilityai/{name}"]
    with torch.device("meta"):
        made = published.random_pipeline(shape, published.VAE)
        attention = sdpa_kernel(SDPBackend.MATH)  # its products are counted
        with torch.no_grad(), attention, FlopCounterMode(display=False) as counter:
            made.transformer(torch.randn(1, 16, 64, 64), torch.randn(1, 205, 4096), torch.randn(1, 2048), torch.ones(1))
        assert forward_flops(shape, Tokens(1024, 205)) == pytest.approx(counter.get_total_flops(), rel=0.01)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            made.vae.decode(torch.randn(1, 16, 64, 64))
        assert decoder_flops(published.VAE, 512, 512) == pytest.approx(counter.get_total_flops(), rel=0.05)


@pytest.mark.parametrize(
    "name, weights, adapters",  # by hand: 8 matrices a block, 7 in the last
    [
        ("stable-diffusion-3-medium-diffusers", 2_084_951_104, 32 * 2 * 1536 * (24 * 8 - 1)),
        ("stable-diffusion-3.5-medium", 2_469_663_936, 32 * 2 * 1536 * (24 * 8 - 1)),
        ("stable-diffusion-3.5-large", 8_146_280_768, 32 * 2 * 2432 * (38 * 8 - 1)),
    ],
)
def test_published_models_are_known_before_they_are_here(name, weights, adapters, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    model = inspect_model(f"stabilityai/{name}")
    assert model.folder is None and model.parameters["transformer"] == weights  # with the stored table of positions
    assert model.stored_bytes == 2 * (weights + 123_650_304 + 694_659_840 + 4_762_310_656 + 83_819_683)
    config = cli.parse(["--model", f"stabilityai/{name}"])
    assert model.lora_parameters(config.lora.target_modules, 32) == adapters
    assert tokens_of(config, model) == Tokens(1024, 77 + config.rollout.max_sequence_length)


def test_a_download_that_was_cut_short_can_go_on(monkeypatch, tmp_path):
    name = "stabilityai/stable-diffusion-3.5-medium"
    snapshot = tmp_path / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    parts = {"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"]}
    (snapshot / "model_index.json").write_text(json.dumps(parts))
    found = str(snapshot / "model_index.json")
    monkeypatch.setattr("sd3_adrpo.model_files.try_to_load_from_cache", lambda model, file: found)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert inspect_model(name).folder is None and inspect_model(name).parameters["transformer"] == 2_469_663_936
    (snapshot / "transformer").mkdir()  # and nothing in it yet
    assert inspect_model(name).folder is None
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="missing: download"):
        inspect_model(name)
    with pytest.raises(UserError, match="missing: download"):
        inspect_model(str(snapshot))


def test_dry_run_of_a_published_model_that_is_not_here(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    sd35 = cli.parse(["--config", "sd3.5-medium-24gb", "--reward", "jpeg", "--prompts", str(PROMPTS)])
    text = " ".join(str(plan.check(sd35)).split())
    assert "not in the local cache, 16.3 GB to download: transformer 2469.7M" in text
    assert "5.1 GB frozen weights, 300.4 MB trained weights" in text
    # 110 prompts, 22 held out: 88 images of 40 passes of 2.228 TFLOP and the decoder's 2.435
    assert "88 images (22 prompts x 4) of 40 forward passes each" in text
    assert f"{88 * (40 * 2.227886 + 2.435247):.3g} TFLOP" in text
    assert "185.2 MB of prompt embeddings go to" in text  # 110 x (205 x 4096 + 2048) values of 2 bytes


def test_forward_equals_a_count():
    model = transformer()
    noisy, embeds, pooled = torch.randn(1, 16, 8, 8), torch.randn(1, 24, 48), torch.randn(1, 40)
    attention = sdpa_kernel(SDPBackend.MATH)  # its products are counted
    with torch.no_grad(), attention, FlopCounterMode(display=False) as counter:
        model(noisy, embeds, pooled, torch.tensor([500.0]))
    # the last block drops its text, and at this size patches and modulation count: all within a fifth
    assert forward_flops(dict(model.config), Tokens(16, 24)) == pytest.approx(counter.get_total_flops(), rel=0.2)


def test_decoder_equals_a_count():
    from tiny import _vae

    vae = _vae()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae.decode(torch.randn(1, 16, 8, 8))
    assert decoder_flops(dict(vae.config), 64, 64) == pytest.approx(counter.get_total_flops(), rel=0.25)
    assert decoder_flops({}, 512, 512) == pytest.approx(2.5e12, rel=0.05)


def test_checkpointing_and_smaller_batches_need_less():
    counts = {"transformer": 2_200_000_000, "vae": 84_000_000, "text_encoder_3": 4_700_000_000}
    plain = SD35_MEDIUM | {"qk_norm": None}
    model = ModelFiles("x", parameters=counts, config=plain)

    def of(*options):
        return memory(cli.parse(["--config", "sd3.5-medium", *options]), model, 18_000_000)

    whole, saving = of(), of("--train.gradient_checkpointing", "true")
    assert whole.frozen == 2 * 2_284_000_000 and whole.lora == 16 * 18_000_000
    # by hand: 13 and 8 values, and 4 of float32 where queries and keys have norms; 1536 x 2 bytes per draw, 12 draws;
    # and the gradients of 1 block of 24
    assert whole.training == pytest.approx(12 * (13 * 24 * 1229 + 8 * 13 * 1024) * 25 / 24 * 1536 * 2)
    assert saving.training == pytest.approx(12 * (24 + 5.5 + 13) * 1229 * 1536 * 2)
    model.config = SD35_MEDIUM
    assert of().training == pytest.approx(12 * (17 * 24 * 1229 + 12 * 13 * 1024) * 25 / 24 * 1536 * 2)
    assert of("--train.optimizer", "adamw_8bit").lora == 10 * 18_000_000
    model.config = plain
    assert of("--train.batch_size", "16").training == whole.training * 4
    assert of("--rollout.decode_batch_size", "1").sampling < of("--rollout.decode_batch_size", "16").sampling


def kept_bytes(policy: Policy, draws: int, tokens: int) -> int:
    """What a forward pass saves for its backward pass, weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in policy.model.transformer.parameters()}
    kept = {}

    def pack(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), value)  # alive, so that no other takes its address
        return value

    size = policy.model.transformer.config.sample_size
    noisy, sigma = torch.randn(draws, 16, size, size), torch.full((draws,), 0.5)
    condition = Condition(torch.randn(draws, tokens, JOINT), torch.randn(draws, sum(WIDTHS)))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        policy.velocity(noisy, sigma, condition)
    return sum(size for size, _ in kept.values())


ATTENTION = cli.parse([]).lora.target_modules[:8]
MORE = ["ff.net.0.proj", "ff.net.2", "norm1.linear", "ff_context.net.2"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dual", "targets", "text"), [(True, [], 8), (False, [], 61), (True, MORE, 61)])
def test_activations_are_those_that_are_kept(tiny_sd35, dtype, dual, targets, text):
    """A transformer 64 wide, 64 image tokens, by what four draws keep beyond two: the slope leaves out weights cast."""
    torch.manual_seed(0)
    model = SD3.load(str(tiny_sd35), dtype)
    model.transformer = transformer(dual, heads=4, size=16, layers=3).to(dtype)
    options = ["--config", "sd3.5-medium", "--rollout.height", "128", "--rollout.width", "128"]
    config = cli.parse([*options, "--lora.target_modules", str([*ATTENTION, *targets]), "--lora.rank", "2"])
    config.train.mixed_precision = "no" if dtype == torch.float32 else "bf16"
    config.train.batch_size = config.train.sigmas_per_sample = 1
    policy = Policy(model, config.lora)
    measured = (kept_bytes(policy, 4, text) - kept_bytes(policy, 2, text)) / 2
    files = ModelFiles("x", config=dict(model.transformer.config), clip_tokens=text - 1)
    predicted = _kept(config, files, dtype.itemsize) * 64 * dtype.itemsize
    assert predicted == pytest.approx(measured, rel=0.2), predicted / measured
