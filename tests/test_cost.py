"""Predicted work and memory: the published figures of SD3.5-medium, and counts of real passes."""

import pytest
import torch
from tiny import transformer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sd3_adrpo import cli
from sd3_adrpo.cost import Tokens, decoder_flops, forward_flops, memory
from sd3_adrpo.model_files import ModelFiles

SD35_MEDIUM = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "dual_attention_layers": list(range(13)),
    "patch_size": 2,
}


def test_sd35_medium_at_512_and_1024_pixels():
    """By hand, w = 1536, N + T = 1229: 24 (24 w^2 1229 + 4 w 1229^2) + 13 (8 w^2 1024 + 4 w 1024^2) = 2.228e12."""
    assert forward_flops(SD35_MEDIUM, Tokens(1024, 205)) == pytest.approx(2.2286e12, rel=1e-3)
    assert forward_flops(SD35_MEDIUM, Tokens(4096, 205)) == pytest.approx(10.9e12, rel=0.03)


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
    model = ModelFiles("x", parameters=counts, config=SD35_MEDIUM)

    def of(*options):
        return memory(cli.parse(["--config", "sd3.5-medium", *options]), model, 18_000_000)

    whole, saving = of(), of("--train.gradient_checkpointing", "true")
    assert whole.frozen == 2 * 2_284_000_000 and whole.lora == 16 * 18_000_000
    # by hand: 17 x 24 x 1229 x 1536 x 2 bytes per draw, 12 draws
    assert whole.training == 12 * 17 * 24 * 1229 * 1536 * 2
    assert saving.training == 12 * (17 + 24) * 1229 * 1536 * 2
    assert of("--train.batch_size", "16").training == whole.training * 4
    assert of("--rollout.decode_batch_size", "1").sampling < of("--rollout.decode_batch_size", "16").sampling
