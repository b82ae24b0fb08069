"""The reward's CLIP: a small open_clip model that sees all combinations, on its own images, with right captions."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTokenizer

from .drawing import SIZE, Layout, draw, lay_out
from .fit import fit
from .grammar import COLOURS, RELATIONS, SHAPES, STYLES, Scene, one_word_wrong, random_scene
from .tokenizer import LENGTH, VOCABULARY

PATCH = 8
MEAN = STD = (0.5, 0.5, 0.5)
WRONG = 2  # captions with one wrong word, contrasted with each right one
CONFIG = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": SIZE, "patch_size": PATCH, "width": 128, "layers": 4, "head_width": 32},
    "text_cfg": {
        "context_length": LENGTH,
        "hf_tokenizer_name": "tokenizer",
        "vocab_size": VOCABULARY,
        "width": 128,
        "heads": 4,
        "layers": 2,
    },
}


def build() -> CLIP:
    vision, text = CLIPVisionCfg(**CONFIG["vision_cfg"]), CLIPTextCfg(**CONFIG["text_cfg"])
    return CLIP(CONFIG["embed_dim"], vision, text)


class Trainer(nn.Module):
    """CLIP and, only while it trains, heads that say what and where the objects are: they make it see in minutes."""

    def __init__(self, clip: CLIP) -> None:
        super().__init__()
        self.clip = clip
        clip.visual.output_tokens = True
        self.heads = nn.ModuleList(nn.Linear(128, len(names) + 1) for names in (SHAPES, COLOURS, STYLES))
        self.where = nn.Linear(CONFIG["embed_dim"], 2 * len(COLOURS))

    def forward(self, images: Tensor, texts: Tensor, labels: list[Tensor], centres: Tensor) -> Tensor:
        """Images (B, 3, H, W), texts (B (1 + WRONG), T), the right captions first; labels of patches (B, 64) each;
        centres (B, colours, 2), NaN for absent colours."""
        pooled, tokens = self.clip.visual(images)
        image = F.normalize(pooled.float(), dim=-1)
        text = F.normalize(self.clip.encode_text(texts).float(), dim=-1)
        logits = self.clip.logit_scale.exp().clamp(max=100) * image @ text.T
        right = torch.arange(len(images))
        contrast = F.cross_entropy(logits, right) + F.cross_entropy(logits[:, : len(images)].T, right)
        patches = sum(
            F.cross_entropy(head(tokens.float()).flatten(0, 1), label.flatten())
            for head, label in zip(self.heads, labels, strict=True)
        )
        # where each colour is, linearly in the embedding: a relation is then a difference that a text can point along
        error = (self.where(pooled.float()).view_as(centres) - centres.nan_to_num()).square()
        return contrast + patches + 4 * error[~centres.isnan()].mean()


def patch_labels(layout: Layout) -> list[Tensor]:
    """For each of shape, colour, style: the object within whose radius a patch's centre lies, plus 1; 0 for none."""
    grid = (torch.arange(SIZE // PATCH) + 0.5) * PATCH
    centres = torch.stack(torch.meshgrid(grid, grid, indexing="xy"), dim=-1).view(1, -1, 1, 2)
    distance = (centres - layout.centre[:, None]).norm(dim=-1) - layout.radius[:, None]
    distance = distance.masked_fill(~layout.present[:, None], 1e3)  # (B, 64, 4)
    nearest, which = distance.min(dim=-1)
    inside = nearest < 2.0
    return [torch.where(inside, names.gather(1, which) + 1, 0) for names in (layout.shape, layout.colour, layout.style)]


def colour_centres(layout: Layout) -> Tensor:
    """Mean position of each colour's objects (B, colours, 2), from -1 to 1; NaN where there are none."""
    member = F.one_hot(layout.colour, len(COLOURS)) * layout.present[..., None]  # (B, 4, colours)
    total = torch.einsum("noc,nod->ncd", member.float(), layout.centre * 2 / SIZE - 1)
    return total / member.sum(1)[..., None]


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blur and noise of random strength: a generator's images are never as clean as drawn ones."""
    blur = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    strength = torch.rand(len(images), 2, 1, 1, 1, generator=generator)
    images = torch.lerp(images, blur, strength[:, 0])
    return images + 0.04 * strength[:, 1] * torch.randn(images.shape, generator=generator)


def wrong_caption(scene: Scene, rng: random.Random, number: int) -> str:
    """One word wrong; every second time it is the relation, where there is one: the hardest word to learn."""
    if number % 2 and scene.relation:
        return replace(scene, relation=rng.choice([name for name in RELATIONS if name != scene.relation])).prompt
    return one_word_wrong(scene, rng).prompt


def train(clip: CLIP, tokenizer: CLIPTokenizer, work_dir: Path, seed: int, steps: int = 6000, batch: int = 96) -> None:
    trainer = Trainer(clip)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rng = random.Random(int(torch.randint(2**31, (1,), generator=generator)))
        scenes = [random_scene(rng) for _ in range(batch)]
        layout = lay_out(scenes, generator)
        images = augment(draw(layout, generator), generator)
        wrong = [wrong_caption(scene, rng, number) for number in range(WRONG) for scene in scenes]
        texts = tokenizer([scene.prompt for scene in scenes] + wrong, padding="max_length", return_tensors="pt")
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):  # faster at so few tokens on a CPU
            return trainer(images * 2 - 1, texts.input_ids, patch_labels(layout), colour_centres(layout))

    fit("clip", trainer, loss, steps=steps, learning_rate=1.5e-3, work_dir=work_dir, seed=seed)
    clip.visual.output_tokens = False


def save(clip: CLIP, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """open_clip's own format, which `open_clip.create_model_and_transforms("local-dir:...")` loads: fp16 on disk."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    config = {"model_cfg": CONFIG, "preprocess_cfg": {"mean": MEAN, "std": STD, "interpolation": "bicubic"}}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    state = {name: value.half().contiguous() for name, value in clip.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
