"""Every option of a run, as dataclasses. Leaf names are those of diffusers' training scripts where they have one.

The defaults are those of SD3.5-medium; `presets/*.yaml` hold what differs for each model, a row per choice.
Where the ADRPO paper (arXiv 2510.18053) does not state a value, the field says "not in the paper".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .objectives.adrpo import Adrpo
from .rewards.clip import ClipReward


@dataclass
class RolloutConfig:
    """Sampling of an epoch's images: `prompts_per_epoch * samples_per_prompt` of them, over all processes."""

    prompts_per_epoch: int = 48  # not in the paper
    samples_per_prompt: int = 8  # not in the paper
    num_inference_steps: int = 10  # ODE steps, not in the paper
    solver: Literal["euler", "heun", "midpoint"] = "euler"
    guidance_scale: float = 1.0  # 1: no guidance and no second forward pass
    batch_size: int = 16  # images per forward pass; does not change the images
    decode_batch_size: int = 8  # images that the decoder has in work; its memory, not the images, depends on it
    height: int = 512
    width: int = 512
    max_sequence_length: int = 128  # T5 tokens; policy, reference and evaluation all use it
    shift: float | None = None  # of the sigma grid; None: the model's own
    merge_lora: bool = True  # sample with the LoRA inside the weights: faster, the same but for rounding (merging.py)


@dataclass
class TrainConfig:
    """The updates of an epoch."""

    batch_size: int = 16  # samples per forward pass, each with `sigmas_per_sample` noise draws
    gradient_accumulation_steps: int = 4
    sigmas_per_sample: int = 3  # noise draws per sample and inner epoch, folded into the batch; not in the paper
    inner_epochs: int = 1  # passes over the epoch's samples, each with fresh noise; not in the paper
    sigma_shift: float = 3.0  # training sigmas: stratified uniform, then shifted as SD3's grid; not in the paper
    learning_rate: float = 3e-4
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 1e-4
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    lr_scheduler: str = "constant"  # any of diffusers.optimization.get_scheduler
    lr_warmup_steps: int = 0
    mixed_precision: Literal["no", "fp16", "bf16"] = "bf16"
    gradient_checkpointing: bool = False


@dataclass
class LoraConfig:
    rank: int = 32
    alpha: float = 64.0
    # names of linear layers, matched by ending; the default leaves out the 13 `attn2` blocks of SD3.5-medium
    target_modules: list[str] = field(
        default_factory=lambda: [
            f"attn.{name}" for name in ("to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split())
        ]
    )


@dataclass
class EvalConfig:
    """The measurement before and after: the same prompts and noise under base and LoRA."""

    samples_per_prompt: int = 4
    num_inference_steps: int = 40
    guidance_scale: float = 1.0
    batch_size: int = 16
    seed: int = 12345  # of the noise; training seeds never meet it


@dataclass
class Config:
    model: str = "shapes"  # "shapes" (built in), a hub id or a local folder
    prompts: str | None = None  # a prompt file; None: the built-in training set
    test_prompts: str | None = None  # None: the built-in test set, or a seeded fifth of `prompts`
    epochs: int = 100
    seed: int = 0
    output_dir: str | None = None  # None: a new dated folder under runs/
    resume_from_checkpoint: str | None = None  # a checkpoint folder, a run folder, or "latest"
    dry_run: bool = False
    text_cache: str | None = None  # folder of prompt embeddings; None: ~/.cache/sd3_adrpo/text; "none": keep none
    objective: Adrpo = field(default_factory=Adrpo)
    reward: ClipReward = field(default_factory=ClipReward)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    report_to: str = "tensorboard"  # any tracker of accelerate, or "none"; metrics.jsonl is always written
    compile: bool = False  # torch.compile of the transformer's blocks; rounds differently (compiling.py)
    checkpointing_epochs: int = 10
    validation_epochs: int = 10  # a grid of fixed prompts and noise every so many epochs
