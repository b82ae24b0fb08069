"""What an epoch costs, from the model's shape alone: floating point operations and bytes. `--dry_run` prints it.

w width, N image tokens, T text tokens, B noise draws in one backward pass. A multiply-add counts as 2 operations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .config import Config
from .model_files import ModelFiles
from .objective import trained_samples

CALLS_PER_STEP = {"euler": 1, "heun": 2, "midpoint": 2}
# of a measured matrix product's speed in that type: on a CPU a whole epoch as measured on the built-in world (products
# in bfloat16 are 4 times as fast there, the rest is not), on a GPU what we aim at
FRACTION_OF_PEAK = {"cpu": {"no": 0.5, "bf16": 0.2, "fp16": 0.2}, "cuda": dict.fromkeys(("no", "bf16", "fp16"), 0.4)}
BACKWARD = 1.12  # in forward passes: no gradients of frozen weights, attention twice, the LoRA's own


@dataclass(frozen=True)
class Tokens:
    image: int
    text: int

    @property
    def all(self) -> int:
        return self.image + self.text


def tokens_of(config: Config, model: ModelFiles) -> Tokens:
    patch = 8 * model.config.get("patch_size", 2)
    image = (config.rollout.height // patch) * (config.rollout.width // patch)
    return Tokens(image, model.text_tokens(config.rollout.max_sequence_length))


def width_of(transformer: dict[str, Any]) -> int:
    return transformer.get("num_attention_heads", 24) * transformer.get("attention_head_dim", 64)


def forward_flops(transformer: dict[str, Any], tokens: Tokens) -> float:
    """One forward pass of one sample: 24 w^2 per token and block for its 12 w x w matrices, 4 w per pair of tokens.

    SD3.5's second attention sees the image only. Modulation and patches, under 1 %, are left out.
    """
    w, layers = width_of(transformer), transformer.get("num_layers", 24)
    block = 24 * w * w * tokens.all + 4 * w * tokens.all**2
    second = 8 * w * w * tokens.image + 4 * w * tokens.image**2
    return layers * block + len(transformer.get("dual_attention_layers") or ()) * second


def decoder_flops(vae: dict[str, Any], height: int, width: int) -> float:
    """One image: 3 x 3 convolutions, 18 c_in c_out per position. Each level has `layers_per_block` + 1 residual blocks
    of two of them, and one to double the resolution; the middle has four."""
    channels = list(reversed(vae.get("block_out_channels", (128, 256, 512, 512))))
    blocks = vae.get("layers_per_block", 2) + 1
    pixels = height * width / 4 ** (len(channels) - 1)
    total, before = 4 * channels[0] ** 2 * pixels, channels[0]
    for level, now in enumerate(channels):
        total += (before * now + (2 * blocks - 1) * now * now) * pixels
        if level < len(channels) - 1:
            pixels *= 4
            total += now * now * pixels
        before = now
    return 18 * total


def epoch_flops(config: Config, model: ModelFiles) -> float:
    """Of sampling, decoding, references and training; rewards come on top."""
    rollout, train = config.rollout, config.train
    images = rollout.prompts_per_epoch * rollout.samples_per_prompt
    guided = 2 if rollout.guidance_scale != 1 else 1
    passes = rollout.num_inference_steps * CALLS_PER_STEP[rollout.solver] * guided
    guided = 2 if train.guidance_scale != 1 else 1
    frozen = guided * len(config.objective.needs) * (1 if train.reuse_noise else train.inner_epochs)
    backward = BACKWARD if config.finetune == "lora" else 2
    trained = (guided + backward + train.gradient_checkpointing) * train.inner_epochs
    passes += train.sigmas_per_sample * (frozen + trained) * trained_samples(config) / images
    one = forward_flops(model.config, tokens_of(config, model))
    return images * (passes * one + decoder_flops(model.vae_config, rollout.height, rollout.width))


def measuring_flops(config: Config, model: ModelFiles, prompts: int) -> float:
    """Of sampling and decoding the test images once; rewards and drift come on top."""
    passes = config.eval.num_inference_steps * (2 if config.eval.guidance_scale != 1 else 1)
    one = forward_flops(model.config, tokens_of(config, model))
    decoding = decoder_flops(model.vae_config, config.rollout.height, config.rollout.width)
    return prompts * config.eval.samples_per_prompt * (passes * one + decoding)


@dataclass(frozen=True)
class Memory:
    """Bytes. `encoding` is 0 where the text encoders stay on disk."""

    encoding: int
    frozen: int
    lora: int
    sampling: int
    training: int

    @property
    def peak(self) -> int:
        return max(self.encoding, self.frozen + self.lora + max(self.sampling, self.training))


def memory(config: Config, model: ModelFiles, lora: int) -> Memory:
    """Weights once per part; per trained weight 8 bytes of value and gradient, and Adam's two moments of 4 or of 1.

    `lora` counts the trained weights; with `finetune` full the transformer among the frozen ones is the reference.
    """
    item = 4 if config.train.mixed_precision == "no" else 2
    counts = {name: count or 0 for name, count in model.parameters.items()}
    encoders = item * sum(count for name, count in counts.items() if name.startswith("text_encoder"))
    frozen = item * sum(counts.values()) - encoders
    each = 10 if config.train.optimizer == "adamw_8bit" else 16
    each += 0 if config.finetune == "lora" or item == 4 else 2  # the transformer beside its masters: full.py
    return Memory(
        frozen + encoders, frozen, each * lora, _sampling(config, model, item), _training(config, model, item)
    )


def _adapted(config: Config, model: ModelFiles) -> list[tuple[str, tuple[int, int]]]:
    """Layers with adapters, each with (out, in)."""
    if config.finetune == "full":
        return []
    ends = tuple(f".{target}" for target in config.lora.target_modules)
    return [(name, size) for name, size in model.layers.items() if f".{name}".endswith(ends)]


def _sampling(config: Config, model: ModelFiles, item: int) -> int:
    """The frozen copies of merged layers, with a block's activations or the decoder's, whichever are more.

    A block has 14 values of the model's width per token at once. The decoder is widest where its last doubling has the
    second level's channels at full resolution, three such maps.
    """
    rollout = config.rollout
    copies = item * sum(out * into for _, (out, into) in _adapted(config, model)) if rollout.merge_lora else 0
    block = rollout.batch_size * 14 * tokens_of(config, model).all * width_of(model.config) * item
    channels = list(model.vae_config.get("block_out_channels", (128, 256, 512, 512)))
    maps = 3 * channels[min(1, len(channels) - 1)] * rollout.height * rollout.width * item
    return copies + max(block, min(rollout.batch_size, rollout.decode_batch_size) * maps)


def _training(config: Config, model: ModelFiles, item: int) -> int:
    """What a backward pass keeps, in bytes, and as many gradients at a time as one block keeps values.

    With checkpointing: one value per token and block, and the last block's own with 5.5 gradients per token.
    """
    train, tokens, layers = config.train, tokens_of(config, model), model.config.get("num_layers", 24)
    values = _kept(config, model, item) * (layers + 1) / layers
    if train.gradient_checkpointing:
        values = (layers + 5.5) * tokens.all + _kept_by_block(config, model, item)
    return int(train.batch_size * train.sigmas_per_sample * values * width_of(model.config) * item)


def _kept(config: Config, model: ModelFiles, item: int) -> float:
    """Values of width w that a backward pass of one draw keeps. A second attention keeps 8 per image token."""
    layers, dual = model.config.get("num_layers", 24), len(model.config.get("dual_attention_layers") or ())
    second = (8 + _in_float32(model, item)) * tokens_of(config, model).image
    return layers * _kept_by_block(config, model, item) + dual * second


def _kept_by_block(config: Config, model: ModelFiles, item: int) -> float:
    """Of a block without a second attention, counted in today's SD3 blocks of diffusers.

    13 per token: inputs of two norms (2), of the adapters (1), queries and keys before and after their norm with the
    values (5), attention (1), GELU's input (4). Nothing is kept for the gradient of a frozen weight, so adapters on
    more layers cost what those read: 1 and 4 for the feed-forward's two, 4 for what modulation multiplies.
    """
    tokens, kept = tokens_of(config, model), 0.0
    for stream, count in (("", tokens.image), ("_context", tokens.text)):
        own = {f"ff{stream}.net.0.proj": 1, f"ff{stream}.net.2": 4, f"norm1{stream}.linear": 4}
        more = sum(own[name] for name in config.lora.target_modules if name in own)
        kept += count * (13 + _in_float32(model, item) + more)
    return kept


def _in_float32(model: ModelFiles, item: int) -> float:
    """Below float32 the norms of queries and keys still compute there: 2 values more, of 4 bytes."""
    return 2 * 4 / item if item < 4 and model.config.get("qk_norm") else 0
