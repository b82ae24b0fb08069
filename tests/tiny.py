"""Tiny random SD3 pipelines on disk, made offline: every part of the real ones, each forward pass in milliseconds."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from sd3_adrpo.types import Condition

CLIP_LENGTH = 16  # tokens that the text encoders see, both ends included
SEQUENCE = 8  # max_sequence_length for the T5 encoder
SIZE = 64  # pixels; the position table goes to 96
PROMPTS = ["a red cube", "two blue balls on a table", "a cat"]
LONG = "a very long prompt that no text encoder of this size can read to its end"
WIDTHS = (16, 24)  # of the two CLIP encoders; different, so that a swap shows
JOINT = 48  # text width of the transformer: more than 16 + 24, so that the pipeline pads as it does for SD3


def unfolded(condition: Condition) -> Condition:
    """With every token that the last one stands for written out, as stock diffusers has them."""
    last = condition.embeds[:, -1:].expand(-1, condition.repeats - 1, -1)
    return Condition(torch.cat([condition.embeds, last], dim=1), condition.pooled)


def clip_tokenizer() -> CLIPTokenizer:
    """Byte-level, with a handful of merges: takes any text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("r", "e"), ("re", "d</w>"), ("b", "l"), ("c", "u")]
    entries = alphabet + [byte + "</w>" for byte in alphabet] + ["".join(pair) for pair in merges]
    entries += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {entry: index for index, entry in enumerate(entries)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CLIP_LENGTH)


def t5_tokenizer() -> T5TokenizerFast:
    """Unigram over single characters and a few pieces."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁a", -2.5), ("▁red", -2.5)]
    pieces += [(chr(code), -3.0) for code in range(33, 127)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=64)


def _clip(tokenizer: CLIPTokenizer, width: int) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config).eval()


def _t5(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    config = T5Config(vocab_size=len(tokenizer), d_model=JOINT, d_kv=8, d_ff=64, num_layers=2, num_heads=2)
    return T5EncoderModel(config).eval()


def transformer(dual: bool = True, heads: int = 2, size: int = 8, layers: int = 2) -> SD3Transformer2DModel:
    """SD3.5-medium's kind when `dual` (a second attention in the first block, qk_norm), else SD3-medium's."""
    return SD3Transformer2DModel(
        sample_size=size,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=heads,
        joint_attention_dim=JOINT,
        caption_projection_dim=16 * heads,
        pooled_projection_dim=sum(WIDTHS),
        pos_embed_max_size=max(6, size // 2),
        dual_attention_layers=(0,) if dual else (),
        qk_norm="rms_norm" if dual else None,
    ).eval()


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=16,
        sample_size=SIZE,
        scaling_factor=1.5305,  # SD3's own two numbers
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def build(folder: Path, *, t5: bool, dual: bool, **scheduler) -> Path:
    """Saves a pipeline with seeded random weights; `t5=False` leaves text_encoder_3 out, as many users of SD3 do."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = clip_tokenizer()
        tokenizer_3 = t5_tokenizer() if t5 else None
        pipeline = StableDiffusion3Pipeline(
            transformer=transformer(dual),
            scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
            vae=_vae(),
            text_encoder=_clip(tokenizer, WIDTHS[0]),
            tokenizer=tokenizer,
            text_encoder_2=_clip(tokenizer, WIDTHS[1]),
            tokenizer_2=clip_tokenizer(),
            text_encoder_3=_t5(tokenizer_3) if t5 else None,
            tokenizer_3=tokenizer_3,
        )
    pipeline.save_pretrained(folder)
    return folder
