"""What the built-in world allows: accuracy and reward of drawn images, reconstructions, the base, guidance, best of 16.

    python -m sd3_adrpo.shapes.ceilings [--prompts FILE] [--images 8] [--output docs/world.json]

Every later result has these beside it: nothing beats drawn images, and training that ends below best-of-16 or guided
sampling has paid for less than they give without training.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from torch import Tensor

from ..config import Config
from ..models.sd3 import SD3
from ..prompts import PROMPTS_DIR, Prompt, read_prompts
from ..rewards.clip import ClipReward, ClipScorer
from ..rollout import sample
from ..seeds import generator_for, seed_for
from .drawing import draw_scenes
from .grammar import one_word_wrong, parse, random_scene
from .verifier import free_diversity, verify

STEPS, GUIDANCE, BEST_OF = 12, 3.0, 16


def rate(images: Tensor, texts: list[str], scorer: ClipScorer) -> dict[str, float | None]:
    right = verify(images, texts)
    return {
        "images": len(texts),
        "accuracy": sum(right) / len(right),
        "reward": scorer(images, [Prompt(text) for text in texts]).mean().item(),
        "free_diversity": free_diversity(images, texts),
    }


def separation(scorer: ClipScorer, count: int, seed: int) -> float:
    """Share of drawn images whose prompt scores above the same prompt with one word changed."""
    rng = random.Random(seed)
    scenes = [random_scene(rng) for _ in range(count)]
    images = draw_scenes(scenes, torch.Generator().manual_seed(seed))
    right = scorer(images, [Prompt(scene.prompt) for scene in scenes])
    wrong = scorer(images, [Prompt(one_word_wrong(scene, rng).prompt) for scene in scenes])
    return (right > wrong).float().mean().item()


def reconstruct(model: SD3, images: Tensor) -> Tensor:
    config, parts = model.vae.config, []
    with torch.no_grad():
        for chunk in (images * 2 - 1).split(64):
            parts.append((model.vae.encode(chunk).latent_dist.mean - config.shift_factor) * config.scaling_factor)
    return model.decode(torch.cat(parts), 64)


def best_of(images: Tensor, texts: list[str], scorer: ClipScorer, number: int) -> tuple[Tensor, list[str]]:
    """Of each `number` consecutive images of one prompt the one with the highest reward."""
    best = scorer(images, [Prompt(text) for text in texts]).view(-1, number).argmax(1) + torch.arange(
        0, len(texts), number
    )
    return images[best], [texts[i] for i in best.tolist()]


def measure(prompts: list[str], number: int, seed: int = 0) -> dict:
    model, scorer = SD3.load("shapes", max_sequence_length=256), ClipReward().load("cpu")
    condition, negative = model.encode(prompts), model.encode([""])
    sigmas, shape = model.sigmas(STEPS, None, 64, 64), model.latent_shape(64, 64)

    def draw(count: int, scale: float) -> tuple[Tensor, list[str]]:
        index = torch.arange(len(prompts)).repeat_interleave(count)
        seeds = [seed_for(seed, "ceilings", row) for row in range(len(index))]
        options = {"guidance_scale": scale, "negative": negative, "batch_size": 64}
        latents = sample(model, condition, index, seeds, sigmas, shape, **options)
        return model.decode(latents, 64), [prompts[i] for i in index.tolist()]

    texts = [text for text in prompts for _ in range(number)]
    drawn = draw_scenes([parse(text) for text in texts], generator_for(seed, "drawn"))
    many, many_texts = draw(BEST_OF, 1.0)
    result = {
        "drawn": rate(drawn, texts, scorer),
        "reconstructions": rate(reconstruct(model, drawn), texts, scorer),
        "base": rate(*draw(number, 1.0), scorer),
        f"guidance {GUIDANCE:g}": rate(*draw(number, GUIDANCE), scorer),
        f"best of {BEST_OF}": rate(*best_of(many, many_texts, scorer, BEST_OF), scorer),
    }
    return {"steps": STEPS, "clip_separation": separation(scorer, 2000, seed), "rows": result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", default=str(PROMPTS_DIR / "shapes_test.csv"))
    parser.add_argument("--images", type=int, default=8, help="per prompt")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    result = measure([prompt.text for prompt in read_prompts(arguments.prompts)], arguments.images, Config().seed)
    print(f"CLIP tells a prompt from one with a word changed: {result['clip_separation']:.1%}")
    for name, row in result["rows"].items():
        free = "-" if row["free_diversity"] is None else f"{row['free_diversity']:.2f}"
        print(f"{name:16} accuracy {row['accuracy']:6.1%}  reward {row['reward']:6.2f}  free_diversity {free}")
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
