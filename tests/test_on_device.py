"""What needs a GPU, seen without one (stand_in_gpu.py): one device, no waiting in the updates, memory at true size."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusion3Pipeline
from stand_in_gpu import DEVICE, StandInGPU
from tiny import SEQUENCE

from sd3_adrpo import cli, cost
from sd3_adrpo.collect import Collector
from sd3_adrpo.measuring import measure
from sd3_adrpo.model_files import inspect_model
from sd3_adrpo.models.published import TRANSFORMERS, VAE, random_pipeline
from sd3_adrpo.models.sd3 import SD3
from sd3_adrpo.policy import Policy
from sd3_adrpo.prompts import Prompt
from sd3_adrpo.rewards.clip import ClipReward
from sd3_adrpo.scoring import Scoring
from sd3_adrpo.trainer import Trainer
from sd3_adrpo.types import Condition

PROMPTS = [Prompt("a red circle"), Prompt("two blue squares")]
OBJECTIVES = """adrpo; orw_cfm_w2; raft; dpo; flow_grpo; diffusion_nft; awm;
    adrpo --objective.refresh_epochs 1 --objective.advantage critic --train.guidance_scale 2 --rollout.guidance_scale 2;
    adrpo --train.gradient_checkpointing true --train.reuse_noise true --train.inner_epochs 2"""


class Brightness:
    unit = encoder = "none"

    def __call__(self, images: torch.Tensor, prompts: list[Prompt]) -> torch.Tensor:
        return images.mean((1, 2, 3)).cpu()


def trainer(pipeline: StableDiffusion3Pipeline, reward, *options: str) -> Trainer:
    """Of two prompts x four samples on the stand-in; an update is two batches of two samples."""
    config = cli.parse(["--config", "sd3.5-medium", "--rollout.max_sequence_length", str(SEQUENCE), *options])
    model = SD3(pipeline, "m", SEQUENCE)
    policy = Policy(model, config.lora, config.train.gradient_checkpointing)
    width = model.transformer.config
    texts = torch.randn(2, 16 + SEQUENCE, width.joint_attention_dim), torch.randn(2, width.pooled_projection_dim)
    condition = Condition(*(text.to(model.dtype) for text in texts))
    scoring = Scoring({"r": reward})
    return Trainer(
        Collector(
            config, Accelerator(), model, policy, scoring, PROMPTS, condition, condition.select(torch.tensor([0]))
        )
    )


@pytest.mark.parametrize("objective", [text.strip() for text in OBJECTIVES.split(";")])
def test_an_epoch_stays_on_its_device_and_never_waits_in_an_update(gpu: StandInGPU, tiny_sd35, objective):
    options = """--rollout.prompts_per_epoch 2 --rollout.samples_per_prompt 4 --rollout.num_inference_steps 3
        --rollout.batch_size 4 --rollout.height 64 --rollout.width 64 --train.batch_size 2 --lora.rank 2
        --train.gradient_accumulation_steps 2 --train.sigmas_per_sample 2"""
    pipeline = StableDiffusion3Pipeline.from_pretrained(str(tiny_sd35), dtype=torch.bfloat16)
    pipeline.to(DEVICE)
    made = trainer(pipeline, Brightness(), *options.split(), "--objective", *objective.split())
    assert made.policy.parameters()[0].is_meta
    waits = {}
    step, freeze = made.optimization.step, made._freeze

    def watched(draws) -> None:
        freeze(draws)
        gpu.reset()

    def stepped() -> torch.Tensor:
        norm = step()
        waits[made.inner, made.update] = dict(gpu.waits)
        return norm

    made._freeze, made.optimization.step = watched, stepped
    metrics, logs = made.run_epoch(lambda *_: None)
    assert len(waits) == len(logs) >= 1 and not any(waits.values()), waits


def test_a_measurement_and_a_saved_state_stay_on_their_device(gpu: StandInGPU, tiny_sd35):
    pipeline = StableDiffusion3Pipeline.from_pretrained(str(tiny_sd35), dtype=torch.bfloat16).to(DEVICE)
    made = trainer(
        pipeline,
        Brightness(),
        *"--eval.samples_per_prompt 2 --eval.num_inference_steps 2 --rollout.height 64 --rollout.width 64".split(),
    )
    with made.policy.merged():
        pass
    own = made.collector
    found = measure(own.policy, own.model, own.scorer, own.prompts, own.config.eval, 64, 64, condition=own.condition)
    assert found.images.shape == (4, 3, 64, 64) and found.reward.device.type == "cpu"
    assert found.w2_drift.shape == (4,) and found.images.device.type == "cpu"
    made.load_state_dict(made.state_dict())
    assert all(parameter.is_meta for parameter in made.policy.parameters())


def test_the_clip_reward_scores_where_it_lies(gpu: StandInGPU):
    scorer = ClipReward().load("cpu")
    scorer.device = DEVICE
    scorer.model.to(DEVICE)
    images = torch.rand(3, 3, 64, 64, device=DEVICE)
    gpu.reset()
    assert scorer(images, [Prompt(text) for text in ("a red circle", "two blue squares", "a red circle")]).shape == (3,)
    assert gpu.live > 0


@pytest.mark.parametrize(
    "model, options",
    [
        ("3.5-medium", "--config sd3.5-medium-24gb --train.batch_size 4"),
        ("3.5-large", "--config sd3.5-medium-24gb --train.batch_size 2 --train.gradient_checkpointing true"),
    ],
)
def test_memory_at_true_size_is_as_predicted(gpu: StandInGPU, monkeypatch, model, options):
    """A batch of sampling, decoding and training of SD3.5 on the stand-in, within 20 % of what the dry run says."""
    name = f"stabilityai/stable-diffusion-{model}"
    with DEVICE:
        pipeline = random_pipeline(TRANSFORMERS[name], VAE)
    pipeline.transformer.to(torch.bfloat16)
    pipeline.vae.to(torch.bfloat16)
    sizes = """--rollout.prompts_per_epoch 2 --rollout.num_inference_steps 1 --rollout.overlap_scoring false
        --train.gradient_accumulation_steps 1"""
    made = trainer(pipeline, Brightness(), *f"{options} --model {name} {sizes}".split())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    files = inspect_model(name)
    predicted = cost.memory(made.config, files, files.lora_parameters(made.config.lora.target_modules, 32))
    before = gpu.reset()
    assert before == pytest.approx(predicted.frozen + predicted.lora / 4, rel=0.01)
    resized(made, made.config.rollout.batch_size // 2)._sample(lambda *_: None)
    assert gpu.peak - before == pytest.approx(predicted.sampling, rel=0.2)
    made = resized(made, made.config.train.batch_size)
    made._sample(lambda *_: None)
    freeze = made._freeze
    made._freeze = lambda draws: (freeze(draws), gpu.reset())
    made.policy.model.transformer.train(made.config.train.gradient_checkpointing)
    assert len(made._update_pass(lambda *_: None)) == 2  # the first makes the optimiser's moments
    with_moments = predicted.training + 3 * predicted.lora / 4
    assert gpu.peak - before == pytest.approx(with_moments, rel=0.2)


def resized(made: Trainer, samples_per_prompt: int) -> Trainer:
    own = made.collector
    own.config.rollout.samples_per_prompt = samples_per_prompt
    parts = own.config, own.accelerator, own.model, own.policy, own.scorer, own.prompts, own.condition, own.negative
    return Trainer(Collector(*parts))
