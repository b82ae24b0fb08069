"""The built-in world's text encoders and transformer, pretrained together by flow matching on captioned latents.

Half of the captions are wrong in one word, as captions from the web are. So the base draws sharp images, often of
the wrong thing, and reinforcement learning has something true to correct. In its last part the model learns the guided
velocity itself, so that it draws sharply without guidance, at one transformer call per step.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from ..models.repeated_token import allow_repeats
from .drawing import SIZE, draw_scenes
from .fit import fit
from .grammar import Scene, one_word_wrong
from .tokenizer import LENGTH, VOCABULARY

WRONG_SHARE = 0.5
DROPPED_SHARE = 0.1  # captions replaced by "", for guidance
GUIDED_FROM = 12000  # step from which the model is its own guide
GUIDANCE = 2.0
WIDTH = 128  # of the transformer
ZERO_TOKENS = 256  # diffusers' default max_sequence_length, and so the number of zeros in place of T5's tokens
TEXT_WIDTH = 64  # of each text encoder


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


def build_transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=SIZE // 8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=5,
        attention_head_dim=32,
        num_attention_heads=WIDTH // 32,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=SIZE // 16,
        qk_norm="rms_norm",
    )


class FlowModel(nn.Module):
    """What `StableDiffusion3Pipeline` computes from token ids to velocity, without its T5 (whose tokens are zeros)."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.text_encoder = build_text_encoder(tokenizer)
        self.text_encoder_2 = build_text_encoder(tokenizer)
        self.transformer = build_transformer()
        allow_repeats(self.transformer)

    def forward(self, noisy: Tensor, sigma: Tensor, ids: Tensor) -> Tensor:
        outputs = [encoder(ids, output_hidden_states=True) for encoder in (self.text_encoder, self.text_encoder_2)]
        embeds = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        pooled = torch.cat([output.text_embeds for output in outputs], dim=-1)
        embeds = F.pad(embeds, (0, 0, 0, 1))  # the T5 tokens: all zero, so one stands for all
        return self.transformer(
            hidden_states=noisy,
            timestep=1000 * sigma,
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            joint_attention_kwargs={"repeats": ZERO_TOKENS},
            return_dict=False,
        )[0]


def captioned(scenes: list[Scene], count: int, rng: random.Random) -> tuple[list[str], list[Scene]]:
    """`count` captions of the pretraining set, and the scene drawn for each: `WRONG_SHARE` of them differ by a word."""
    captions, drawn = [], []
    for _ in range(count):
        scene = shown = rng.choice(scenes)
        if rng.random() < WRONG_SHARE:
            shown = one_word_wrong(scene, rng)
            while shown.split != "pretrain":  # what is held out stays out, under a wrong caption too
                shown = one_word_wrong(scene, rng)
        captions.append(scene.prompt)
        drawn.append(shown)
    return captions, drawn


@torch.no_grad()
def encode_dataset(
    vae: AutoencoderKL, tokenizer: CLIPTokenizer, scenes: list[Scene], path: Path, seed: int, count: int
):
    """Latents (count, 16, 8, 8) in fp16 and token ids (count, T), drawn and encoded once, kept in `path`."""
    if path.exists():
        saved = torch.load(path, weights_only=True)
        return saved["latents"], saved["ids"]
    captions, drawn = captioned(scenes, count, random.Random(seed))
    ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    generator = torch.Generator().manual_seed(seed)
    latents = torch.empty(count, 16, SIZE // 8, SIZE // 8, dtype=torch.float16)
    for start in tqdm(range(0, count, 128), desc="latents", mininterval=5):
        images = draw_scenes(drawn[start : start + 128], generator) * 2 - 1
        with torch.autocast("cpu", torch.bfloat16):
            mean = vae.encode(images.to(memory_format=torch.channels_last)).latent_dist.mean.float()
        latents[start : start + 128] = (mean - vae.config.shift_factor) * vae.config.scaling_factor
    torch.save({"latents": latents, "ids": ids}, path)
    return latents, ids


def train(
    model: FlowModel,
    tokenizer: CLIPTokenizer,
    latents: Tensor,
    ids: Tensor,
    work_dir: Path,
    seed: int,
    steps: int = 20000,
    batch: int = 128,
) -> None:
    """Flow matching with SD3's logit-normal sigmas (arXiv 2403.03206, section 3.1), then model guidance.

    Model guidance (arXiv 2502.12154) moves the target by w (v(x, c) - v(x, "")), no gradient. Where v(x, c) settles,
    v = u + w (v - v_empty), that is v = v_empty + (u - v_empty) / (1 - w): guided by the scale 1 / (1 - w).
    """
    share = 1 - 1 / GUIDANCE
    empty = tokenizer("", padding="max_length", return_tensors="pt").input_ids

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents), (batch,), generator=generator)
        clean = latents[rows].float()
        dropped = torch.rand(batch, 1, generator=generator) < DROPPED_SHARE
        noise = torch.randn(clean.shape, generator=generator)
        sigma = torch.randn(batch, generator=generator).sigmoid()
        noisy, target = torch.lerp(clean, noise, sigma[:, None, None, None]), noise - clean
        # the fused attention's backward is slow at so few tokens on a CPU
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            velocity = model(noisy, sigma, torch.where(dropped, empty, ids[rows])).float()
            if step >= GUIDED_FROM:
                with torch.no_grad():
                    unguided = model(noisy, sigma, empty.expand(batch, -1)).float()
                    target = target + share * (velocity - unguided) * ~dropped[:, :, None, None]
        return F.mse_loss(velocity, target)

    fit(
        "flow_model",
        model,
        loss,
        steps=steps,
        learning_rate=2e-3,
        work_dir=work_dir,
        seed=seed,
        ema_decay=0.998,
        muon=True,
    )
