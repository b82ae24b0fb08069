"""The built-in world's autoencoder: diffusers' `AutoencoderKL`, 8 x smaller, 16 latent channels, as SD3's."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from .drawing import SIZE, draw_scenes
from .fit import fit
from .grammar import random_scene

KL_WEIGHT = 5e-4  # per latent entry: keeps the latents smooth enough for a small flow model
NOISE = 0.15  # of a latent's standard deviation, seen by the decoder alone: a flow model's latents are never exact


def build() -> AutoencoderKL:
    """Channels are few where pixels are many: decoding costs a third of a uniform width and reads as well."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 128),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    ).to(memory_format=torch.channels_last)


def scene_batch(step: int, batch: int, generator: torch.Generator) -> Tensor:
    """Freshly drawn images of random scenes, (batch, 3, 64, 64) in [-1, 1]."""
    rng = random.Random(int(torch.randint(2**31, (1,), generator=generator)))
    images = draw_scenes([random_scene(rng) for _ in range(batch)], generator)
    return (images * 2 - 1).to(memory_format=torch.channels_last)


def train(vae: AutoencoderKL, work_dir: Path, seed: int, steps: int = 3200, batch: int = 32) -> None:
    """Both halves, on reconstruction (L1 + 2 L2) and KL."""

    def loss(step: int, generator: torch.Generator) -> Tensor:
        images = scene_batch(step, batch, generator)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator)
            decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        error = decoded.float() - images
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return error.abs().mean() + 2 * error.square().mean() + KL_WEIGHT * kl

    fit("autoencoder", vae, loss, steps=steps, learning_rate=2e-3, work_dir=work_dir, seed=seed)


def refine_decoder(vae: AutoencoderKL, work_dir: Path, seed: int, steps: int = 4000, batch: int = 32) -> None:
    """The decoder alone, on slightly wrong latents; the encoder, and with it the latent space, stays as it is."""
    vae.encoder.requires_grad_(False)
    scale = 1 / vae.config.scaling_factor

    def loss(step: int, generator: torch.Generator) -> Tensor:
        images = scene_batch(step, batch, generator)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                latents = vae.encode(images).latent_dist.mean.float()
            strength = NOISE * scale * torch.rand(batch, 1, 1, 1, generator=generator)
            noise = torch.randn(latents.shape, generator=generator)
            decoded = vae.decode(latents + strength * noise).sample
        error = decoded.float() - images
        return error.abs().mean() + 2 * error.square().mean()

    fit("decoder", vae.decoder, loss, steps=steps, learning_rate=1e-3, work_dir=work_dir, seed=seed + 1)


@torch.no_grad()
def set_scale(vae: AutoencoderKL, seed: int, count: int = 512) -> None:
    """Shift and scale that give the latents of drawn images mean 0 and standard deviation 1 (SD3's convention)."""
    latents = vae.encode(scene_batch(0, count, torch.Generator().manual_seed(seed))).latent_dist.mean
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
