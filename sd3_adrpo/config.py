"""Every option of a run, as dataclasses. Leaf names are those of diffusers' training scripts where they have one.

The defaults are those of SD3.5-medium; `presets/*.yaml` hold what differs for each model, a row per choice.
Where the ADRPO paper (arXiv 2510.18053) does not state a value, the field says "not in the paper".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .objective import Objective
from .objectives.adrpo import Adrpo
from .rewards._mixed import NoReward
from .rewards.clip import ClipReward


@dataclass
class RolloutConfig:
    """Sampling of an epoch's images: `prompts_per_epoch * samples_per_prompt` of them, over all processes."""

    prompts_per_epoch: int = 48  # taken in turn from the shuffled file; not in the paper
    samples_per_prompt: int = 8  # images of each; not in the paper
    num_inference_steps: int = 10  # ODE steps; not in the paper
    solver: Literal["euler", "heun", "midpoint"] = "euler"  # of the ODE; heun and midpoint cost twice the time
    guidance_scale: float = 1.0  # of sampling; 1: no guidance and no second forward pass
    batch_size: int = 16  # images per forward pass; does not change the images
    decode_batch_size: int = 8  # images that the decoder has in work; its memory, not the images, depends on it
    height: int = 512  # pixels; a multiple of 16 for SD3 and SD3.5
    width: int = 512  # pixels, likewise
    max_sequence_length: int = 128  # T5 tokens; policy, reference and evaluation all use it
    shift: float | None = None  # of the sigma grid; None: the model's own
    overlap_scoring: bool = True  # score a batch while the next is sampled: the same scores, earlier (overlap.py)
    merge_lora: bool = True  # sample with the LoRA inside the weights: faster, the same but for rounding (merging.py)
    fp8: bool = False  # sample with float8 products, for speed on Ada and Hopper GPUs, with `compile` (fp8.py)


@dataclass
class TrainConfig:
    """The updates of an epoch."""

    batch_size: int = 16  # samples per forward pass, each with `sigmas_per_sample` noise draws
    gradient_accumulation_steps: int = 4  # batches per update
    sigmas_per_sample: int = 3  # noise draws per sample and inner epoch, folded into the batch; not in the paper
    inner_epochs: int = 1  # passes over the epoch's samples; not in the paper
    reuse_noise: bool = False  # all passes of an epoch at the same noise: its frozen velocities are computed only once
    guidance_scale: float = 1.0  # of the velocities that are trained, and of their references; 1: no guidance
    sigma_shift: float = 3.0  # training sigmas: stratified uniform, then shifted as SD3's grid; not in the paper
    sigma_max: float = 1.0  # no training sigma lies above; there may be no signal there (docs/tuning.md)
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"  # 8-bit moments need torchao; for full fine-tuning
    learning_rate: float = 3e-4  # of AdamW, after the warm-up
    adam_beta1: float = 0.9  # decay of the gradient's running mean
    adam_beta2: float = 0.999  # decay of its square's running mean
    adam_weight_decay: float = 1e-4  # per update, times the learning rate; of the LoRA's weights
    adam_epsilon: float = 1e-8  # added to the root of the mean square
    max_grad_norm: float = 1.0  # a longer gradient is scaled down to this norm
    # a schedule of diffusers.optimization.get_scheduler
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = "constant"
    lr_warmup_steps: int = 0  # updates over which the learning rate rises from 0
    mixed_precision: Literal["no", "fp16", "bf16"] = "bf16"  # type of the frozen model; no: fp32. The LoRA is fp32
    gradient_checkpointing: bool = False  # less memory for activations, about a third more time


@dataclass
class LoraConfig:
    """The adapters that are trained."""

    rank: int = 32  # of each layer's change
    alpha: float = 64.0  # the change is alpha / rank * B A
    # names of linear layers, matched by ending; the default leaves out the 13 `attn2` blocks of SD3.5-medium
    target_modules: list[str] = field(
        default_factory=lambda: [
            f"attn.{name}" for name in ("to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split())
        ]
    )


@dataclass
class EvalConfig:
    """The measurement before and after: the same prompts and noise under base and LoRA."""

    samples_per_prompt: int = 4  # images of each test prompt, under base and LoRA
    num_inference_steps: int = 40  # ODE steps
    guidance_scale: float = 1.0  # 1: no guidance
    batch_size: int = 16  # images per forward pass; does not change the images
    seed: int = 12345  # of the noise; training seeds never meet it
    embedder: str | None = None  # CLIP of clip_diversity, as reward.model; None: a clip reward's own, or the built-in
    embedder_pretrained: str | None = None  # with a name: its tag, or a weight file


@dataclass
class Config:
    """A whole run."""

    model: str = "shapes"  # "shapes" (built in), a hub id or a local folder
    prompts: str | None = None  # a prompt file; None: the built-in training set
    test_prompts: str | None = None  # None: the built-in test set, or a seeded fifth of `prompts`, at most 200
    # lora: adapters; full: all weights of the transformer, which takes 20 bytes of memory per weight and a learning
    # rate of about 1e-5 for SD3.5 (docs/scaling.md); the lora options then mean nothing
    finetune: Literal["lora", "full"] = "lora"
    epochs: int = 100  # each samples images, then trains on them
    seed: int = 0  # of the LoRA's first weights, the prompts' order and all training noise
    output_dir: str | None = None  # None: a new dated folder under runs/
    # a checkpoint folder, a run folder, or "latest"; the run's own options hold where no others are given
    resume_from_checkpoint: str | None = None
    dry_run: bool = False  # check everything, print the plan and stop
    reward_timeout: float = 600.0  # seconds that a reward may take for one batch; 0: as long as it likes
    reward_retries: int = 2  # times that a reward which raised is called again, after 1 s, 2 s, ...
    text_cache: str | None = None  # folder of prompt embeddings; None: ~/.cache/sd3_adrpo/text; "none": keep none
    base_cache: str | None = None  # folder where runs of one process share what the base decides (base_cache.py)
    objective: Objective = field(default_factory=Adrpo)  # what is minimised
    reward: ClipReward = field(default_factory=ClipReward)  # what is maximised
    watch: NoReward = field(default_factory=NoReward)  # what is only watched
    rollout: RolloutConfig = field(default_factory=RolloutConfig)  # how images are sampled
    train: TrainConfig = field(default_factory=TrainConfig)  # how they are learnt from
    lora: LoraConfig = field(default_factory=LoraConfig)  # what is trained
    eval: EvalConfig = field(default_factory=EvalConfig)  # how the result is measured
    report_to: str = "tensorboard"  # any tracker of accelerate, or "none"; metrics.jsonl is always written
    compile: bool = False  # torch.compile of the transformer's blocks; rounds differently (compiling.py)
    checkpointing_epochs: int = 10  # a checkpoint every so many epochs; the last two stay
    validation_epochs: int = 10  # a grid of fixed prompts and noise every so many epochs
    evaluation_epochs: int = 0  # the whole test set is measured every so many epochs too; 0: before and after only
    # reward up and the first watched reward, or else the built-in world's accuracy, down: say so, stop, or stop and go
    # back to the best LoRA; looks at every evaluation, so give evaluation_epochs too
    alarm: Literal["off", "warn", "stop", "restore"] = "off"
    # a w2_drift above it, at an evaluation (evaluation_epochs), ends the run, which is then measured and kept
    drift_limit: float | None = None
    alarm_stderrs: float = 3.0  # standard errors by which the held-out signal must have fallen

    def __post_init__(self) -> None:
        if getattr(self.objective, "pairs_file", None):
            self.rollout.samples_per_prompt = 2  # the chosen and the rejected image
        for name in ("reward_timeout", "reward_retries"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more")
