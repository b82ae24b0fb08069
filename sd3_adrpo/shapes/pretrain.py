"""Rebuilds the built-in world's weights from a seed:

    python -m sd3_adrpo.shapes.pretrain [--stage autoencoder|decoder|clip|flow|all] [--seed 0] [--threads 2]

Interrupted stages continue from `--work_dir` when started again. `clip` needs no other stage and can run beside them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from transformers import T5Config, T5EncoderModel

from ..prompts import PROMPTS_DIR, read_prompts
from . import WEIGHTS_DIR, autoencoder, clip, flow_model, tokenizer
from .grammar import parse

SHIFT = 2.0  # of the sigma grid; SD3's 3 is for 4,096 image tokens, here are 16
IMAGES = 64_000  # drawn and encoded for the transformer


def autoencoder_stage(work: Path, output: Path, seed: int) -> None:
    vae = autoencoder.build()
    autoencoder.train(vae, work, seed)
    autoencoder.set_scale(vae, seed)
    vae.save_pretrained(work / "vae")


def decoder_stage(work: Path, output: Path, seed: int) -> None:
    """Leaves the latent space as it is, so the transformer may be trained before, after or meanwhile."""
    vae = AutoencoderKL.from_pretrained(work / "vae").to(memory_format=torch.channels_last)
    autoencoder.refine_decoder(vae, work, seed + 1)
    vae.save_pretrained(work / "vae")


def clip_stage(work: Path, output: Path, seed: int) -> None:
    bpe = tokenizer.train()
    model = clip.build()
    clip.train(model, bpe, work, seed + 2)
    clip.save(model, bpe, output / "clip")


def flow_stage(work: Path, output: Path, seed: int) -> None:
    vae = AutoencoderKL.from_pretrained(work / "vae")
    bpe = tokenizer.train()
    scenes = [parse(prompt.text) for prompt in read_prompts(PROMPTS_DIR / "shapes_pretrain.csv")]
    latents, ids = flow_model.encode_dataset(vae, bpe, scenes, work / "latents.pt", seed + 3, IMAGES)
    model = flow_model.FlowModel(bpe)
    flow_model.train(model, bpe, latents, ids, work, seed + 4)
    vae = AutoencoderKL.from_pretrained(work / "vae")  # again: its decoder may have been refined meanwhile
    save_pipeline(model, vae, bpe, output / "pipeline")


def silent_t5() -> T5EncoderModel:
    """A T5 that says nothing: its last norm multiplies by zero, as when SD3 is used without T5.

    diffusers cannot load an SD3 folder without one unless it is told so, and this world has no need of a third encoder.
    """
    config = T5Config(
        vocab_size=tokenizer.VOCABULARY,
        d_model=2 * flow_model.TEXT_WIDTH,
        d_kv=8,
        d_ff=8,
        num_layers=1,
        num_heads=1,
    )
    t5 = T5EncoderModel(config)
    torch.nn.init.zeros_(t5.encoder.final_layer_norm.weight)
    return t5.half()


def save_pipeline(model: flow_model.FlowModel, vae: AutoencoderKL, bpe, folder: Path) -> None:
    """A StableDiffusion3Pipeline folder, fp16 on disk; configs say fp32, which is what everybody then computes in."""
    pipeline = StableDiffusion3Pipeline(
        transformer=model.transformer.half(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae.half(),
        text_encoder=model.text_encoder.half(),
        tokenizer=bpe,
        text_encoder_2=model.text_encoder_2.half(),
        tokenizer_2=bpe,
        text_encoder_3=silent_t5(),
        tokenizer_3=bpe,
    )
    pipeline.save_pretrained(folder)
    for path in folder.glob("*/config.json"):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)  # a folder of this computer
        if "dtype" in config:
            config["dtype"] = "float32"  # transformers would load what its config names
        path.write_text(json.dumps(config, indent=2) + "\n")


STAGES = {"autoencoder": autoencoder_stage, "decoder": decoder_stage, "clip": clip_stage, "flow": flow_stage}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=[*STAGES, "all"], default="all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=WEIGHTS_DIR)
    parser.add_argument("--work_dir", type=Path, default=Path("runs/pretrain"), help="checkpoints and encoded images")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    for name in STAGES if arguments.stage == "all" else [arguments.stage]:
        torch.manual_seed(arguments.seed)  # the initial weights
        STAGES[name](arguments.work_dir, arguments.output_dir, arguments.seed)


if __name__ == "__main__":
    main()
