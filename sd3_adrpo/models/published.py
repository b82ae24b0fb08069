"""The published SD3 models' shapes, from their config.json on the hub: what is known of them before a download.

Weights on the hub are stored in 16 bits.
"""

from __future__ import annotations

from typing import Any

import torch

SD3_MEDIUM = {  # 2.0 billion weights
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
    "dual_attention_layers": (),
    "qk_norm": None,
}
SD35_MEDIUM = {  # 2.2 billion
    **SD3_MEDIUM,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
SD35_LARGE = {  # 8.1 billion
    **SD3_MEDIUM,
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "qk_norm": "rms_norm",
}
TRANSFORMERS = {
    "stabilityai/stable-diffusion-3-medium-diffusers": SD3_MEDIUM,
    "stabilityai/stable-diffusion-3.5-medium": SD35_MEDIUM,
    "stabilityai/stable-diffusion-3.5-large": SD35_LARGE,
    "stabilityai/stable-diffusion-3.5-large-turbo": SD35_LARGE,
}
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "latent_channels": 16,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
OTHER_PARTS = {  # weights: CLIP-L, CLIP-bigG and T5-XXL with their projections, and the VAE
    "text_encoder": 123_650_304,
    "text_encoder_2": 694_659_840,
    "text_encoder_3": 4_762_310_656,
    "vae": 83_819_683,
}


def transformer_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Name and shape of every stored tensor of the transformer; none of them is made."""
    from diffusers import SD3Transformer2DModel  # late: takes seconds

    with torch.device("meta"):
        state = SD3Transformer2DModel(**config).state_dict()
    return {name: tuple(value.shape) for name, value in state.items()}


def random_pipeline(transformer: dict, vae: dict) -> Any:
    """A pipeline of these shapes with random weights and without text encoders, to measure speed and memory with."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    absent = "text_encoder tokenizer text_encoder_2 tokenizer_2 text_encoder_3 tokenizer_3".split()
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKL(**vae),
        **dict.fromkeys(absent),
    )
