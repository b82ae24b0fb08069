"""The models that the benchmark runs: ours with a LoRA, and the same as a stock pipeline beside it."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from diffusers import StableDiffusion3Pipeline

from sd3_adrpo import cli
from sd3_adrpo.collect import Collector  # noqa: E402
from sd3_adrpo.config import Config
from sd3_adrpo.errors import UserError
from sd3_adrpo.models.published import SD35_MEDIUM, VAE, random_pipeline
from sd3_adrpo.models.sd3 import SD3
from sd3_adrpo.policy import Policy
from sd3_adrpo.prompts import Prompt
from sd3_adrpo.rewards.clip import ClipScorer
from sd3_adrpo.scoring import Scoring
from sd3_adrpo.trainer import Trainer
from sd3_adrpo.types import Condition, Rollout

PROMPTS = ["a red circle", "two blue squares", "a green heart above a pink cross", "three yellow stars"]
TINY = {  # of the same kind, to try the benchmark itself
    **SD35_MEDIUM,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 48,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 40,
    "pos_embed_max_size": 16,
    "dual_attention_layers": (0,),
}
TINY_VAE = {**VAE, "block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}
SHAPES = ("shapes", "sd3.5-medium", "tiny")


@dataclass
class Setup:
    config: Config
    model: SD3
    policy: Policy
    scorer: ClipScorer
    stock: StableDiffusion3Pipeline | None
    condition: Condition  # a row per prompt, as our loop caches it
    stock_condition: Condition  # the same with every token written out, as the stock pipeline has them
    encodes: bool  # whether there are text encoders

    def trainer(self) -> Trainer:
        """A trainer with samples of noise to train on; its learning rate is 0, so every repeat starts the same."""
        arguments = (self.config, Accelerator(), self.model, self.policy, Scoring({"clip": self.scorer}))
        made = Trainer(Collector(*arguments, [Prompt(text) for text in PROMPTS], self.condition))
        generator = torch.Generator().manual_seed(0)
        prompt = torch.arange(made.samples) % len(PROMPTS)
        clean = torch.randn(made.samples, *made.shape, generator=generator)
        made.rollout = Rollout(prompt, clean, torch.zeros(made.samples))
        made.advantage = torch.randn(made.samples, generator=generator).clamp(-1, 1)
        return made


def setup(shape: str, options: list[str], device: torch.device) -> Setup:
    """`options` are those of train_sd3.py. UserError where a GPU is needed."""
    if shape == "sd3.5-medium" and device.type != "cuda":
        raise UserError("--shape sd3.5-medium needs a CUDA GPU; --shape shapes measures on a CPU")
    preset = {"shapes": ["--model", "shapes"], "sd3.5-medium": ["--config", "sd3.5-medium"]}
    tiny = "--config sd3.5-medium --rollout.height 64 --rollout.width 64 --train.mixed_precision no".split()
    config = cli.parse([*preset.get(shape, tiny), "--train.learning_rate", "0", *options], "benchmark.py")
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[config.train.mixed_precision]
    length = config.rollout.max_sequence_length
    if shape == "shapes":
        model, scorer = SD3.load("shapes", dtype, device, length), config.reward.load(device)
        stock = SD3.load("shapes", dtype, device, length).pipeline
        for block in stock.transformer.transformer_blocks:
            block.attn.set_processor(type(block.attn.processor).__base__())  # the stock one again
        condition = model.encode(PROMPTS)
        stock_condition = _written_out(condition)
    else:
        torch.manual_seed(0)
        large = shape == "sd3.5-medium"
        pipeline = random_pipeline(*((SD35_MEDIUM, VAE) if large else (TINY, TINY_VAE))).to(device, dtype)
        separate = {**pipeline.components, "transformer": copy.deepcopy(pipeline.transformer)}
        stock, model = StableDiffusion3Pipeline(**separate), SD3(pipeline, shape, length)
        width = model.transformer.config.joint_attention_dim, model.transformer.config.pooled_projection_dim
        embeds = torch.randn(len(PROMPTS), 77 + length, width[0]).to(dtype)
        condition = stock_condition = Condition(embeds, torch.randn(len(PROMPTS), width[1]).to(dtype))
        scorer = _random_clip("ViT-H-14" if large else "shapes", device)
    stock.set_progress_bar_config(disable=True)
    policy = Policy(model, config.lora, config.train.gradient_checkpointing)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:  # as after some training
                parameter.normal_(std=0.01)
    return Setup(config, model, policy, scorer, stock, condition, stock_condition, shape == "shapes")


def _written_out(condition: Condition) -> Condition:
    last = condition.embeds[:, -1:].expand(-1, condition.repeats - 1, -1)
    return Condition(torch.cat([condition.embeds, last], dim=1), condition.pooled)


def _random_clip(name: str, device: torch.device) -> ClipScorer:
    if name == "shapes":
        from sd3_adrpo.rewards.clip import ClipReward

        return ClipReward().load(device)
    import open_clip

    model, _, transform = open_clip.create_model_and_transforms(name, device=device)
    return ClipScorer(model, transform, open_clip.get_tokenizer(name), f"{name}, random weights", device)
