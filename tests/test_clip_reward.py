"""The CLIP reward against open_clip itself, on a tiny random CLIP in open_clip's own format."""

from __future__ import annotations

import json
import math
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from tiny import clip_tokenizer
from torchvision.transforms.functional import to_pil_image

from sd3_adrpo.errors import UserError
from sd3_adrpo.prompts import Prompt
from sd3_adrpo.rewards.clip import ClipReward, ClipScorer, RewardError, quantise

SIZE, LENGTH = 32, 24
TEXTS = ["a red cube", "two blue balls left of a café", "a cat " * 40]
PROMPTS = [Prompt(text) for text in TEXTS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, tokenizer = tmp_path_factory.mktemp("clip"), clip_tokenizer()
    text = {"context_length": LENGTH, "vocab_size": len(tokenizer), "width": 16, "heads": 2, "layers": 2}
    vision = {"image_size": SIZE, "patch_size": 8, "width": 16, "head_width": 8, "layers": 2}
    # the last name only has to be there: open_clip then takes the tokenizer of the folder instead of its own
    model = {"embed_dim": 12, "vision_cfg": vision, "text_cfg": {**text, "hf_tokenizer_name": "tokenizer"}}
    preprocess = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25], "interpolation": "bicubic"}
    config = {"model_cfg": model, "preprocess_cfg": preprocess}
    (path / "open_clip_config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = open_clip.CLIP(12, open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**text)).state_dict()
    save_file(
        {name: value.half().contiguous() for name, value in weights.items()}, path / "open_clip_model.safetensors"
    )
    return path


@pytest.fixture(scope="module")
def scorer(folder: Path) -> ClipScorer:
    return ClipReward(model=str(folder)).load()


def _images(height: int, width: int, count: int = 3) -> torch.Tensor:
    """Smooth areas and hard edges, in [0, 1]."""
    generator = torch.Generator().manual_seed(height + width)
    images = torch.rand(count, 3, height, width, generator=generator)
    images[:, :, height // 4 : height // 2] = 1.0
    images[:, :, :, : width // 3] = 0.0
    return images


def _transform(folder: Path, images: torch.Tensor) -> torch.Tensor:
    transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")[2]
    return torch.stack([transform(to_pil_image(image)) for image in quantise(images)])


def test_score_is_100_times_the_cosine_of_open_clip(folder, scorer):
    model = open_clip.create_model(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    images = _images(SIZE, SIZE)
    with torch.no_grad():
        image = model.eval().encode_image(_transform(folder, images))
        text = model.encode_text(tokenizer(TEXTS))
    expected = 100 * torch.cosine_similarity(image, text)
    assert (scorer(images, PROMPTS) - expected).abs().max() < 1e-4
    assert scorer(images, PROMPTS).dtype == torch.float32
    assert scorer.unit == "100 x cosine" and scorer.encoder == str(folder)


def test_preprocessing_of_an_image_of_the_models_size_equals_open_clip(folder, scorer):
    images = _images(SIZE, SIZE)
    assert (scorer.preprocess(images) - _transform(folder, images)).abs().max() < 1e-6


@pytest.mark.parametrize("height, width", [(64, 64), (40, 40), (20, 20), (64, 96), (100, 50)])
def test_resizing_equals_open_clips_to_one_step_of_8_bits(folder, scorer, height, width):
    images = _images(height, width)
    ours, theirs = scorer.preprocess(images), _transform(folder, images)
    assert ours.shape == theirs.shape == (3, 3, SIZE, SIZE)
    std = torch.tensor([0.2, 0.3, 0.25])[:, None, None]
    assert ((ours - theirs) * std).abs().max() < 1.001 / 255


def test_images_are_scored_as_saved(scorer):
    images = _images(SIZE, SIZE)
    saved = quantise(images)
    assert saved.dtype == torch.uint8 and torch.equal(quantise(saved.float() / 255), saved)
    assert quantise(torch.tensor([-0.2, 0.5, 1.2])).tolist() == [0, 128, 255]
    assert torch.equal(scorer(images, PROMPTS), scorer(saved, PROMPTS))


def test_padded_and_uneven_models_go_through_open_clips_own_transform(folder, scorer):
    transform = open_clip.image_transform(SIZE, is_train=False, resize_mode="longest")
    padded = ClipScorer(scorer.model, transform, scorer.tokenizer, "padded", "cpu")
    images = _images(64, 48, count=2)
    expected = torch.stack([transform(to_pil_image(image)) for image in quantise(images)])
    assert torch.equal(padded.preprocess(images), expected)


def test_embeddings_have_length_one_and_batches_do_not_matter(scorer):
    images = _images(SIZE, SIZE, count=5)
    whole, parts = scorer.embed_images(images), scorer.embed_images(images, batch_size=2)
    assert torch.allclose(whole, parts, atol=1e-6)
    assert torch.allclose(whole.norm(dim=1), torch.ones(5), atol=1e-6)
    assert not whole.requires_grad and not scorer.model.training


def test_each_text_is_computed_once(folder):
    scorer = ClipReward(model=str(folder)).load()
    seen, tokenizer = [], scorer.tokenizer
    scorer.tokenizer = lambda texts: seen.extend(texts) or tokenizer(texts)
    first = scorer.embed_texts(["a", "b", "a"])
    again = scorer.embed_texts(["b", "c", "a"])
    assert seen == ["a", "b", "c"]
    assert torch.equal(first[0], first[2]) and torch.equal(first[1], again[0]) and torch.equal(first[0], again[2])


def test_broken_image_names_its_prompt(scorer):
    images = _images(SIZE, SIZE)
    images[1, 0, 3, 3] = math.nan
    with pytest.raises(RewardError, match="nan for 1 of 3 images.*'two blue balls") as caught:
        scorer(images, PROMPTS)
    assert isinstance(caught.value, UserError) and "a red cube" not in str(caught.value)


def test_every_image_needs_its_prompt(scorer):
    with pytest.raises(ValueError, match="3 images came with 2 prompts"):
        scorer(_images(SIZE, SIZE), PROMPTS[:2])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model": "VIT-B32"}, "'VIT-B32'.*ViT-B-32"),
        ({"model": "ViT-B-32"}, "pretrained is None.*laion2b_s34b_b79k"),
        ({"model": "ViT-B-32", "pretrained": "laion"}, "'laion'.*laion2b_s34b_b79k"),
        ({"model": "shapes", "pretrained": "openai"}, "leave it out"),
    ],
)
def test_unusable_options_say_what_is_allowed(options, message):
    with pytest.raises(UserError, match=message):
        ClipReward(**options).load()


def test_folder_without_weights_is_refused_instead_of_random(folder, tmp_path):
    for name in ("open_clip_config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(UserError, match="does not load"):
        ClipReward(model=str(tmp_path)).load()


def test_weights_from_a_local_file(tmp_path, monkeypatch, folder):
    """A name and a file, as for any open_clip checkpoint of one's own."""
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    named = tmp_path / "tiny-clip.json"
    named.write_text(json.dumps(config))
    open_clip.add_model_config(named)
    monkeypatch.setattr(
        open_clip, "get_tokenizer", lambda source: open_clip.factory.get_tokenizer(f"local-dir:{folder}")
    )
    weights = folder / "open_clip_model.safetensors"
    scorer = ClipReward(model="tiny-clip", pretrained=str(weights)).load()
    assert scorer.encoder == "tiny-clip/open_clip_model.safetensors"
    expected = ClipReward(model=str(folder)).load().embed_texts(TEXTS)
    assert torch.equal(scorer.embed_texts(TEXTS), expected)


def test_openai_tags_get_the_activation_they_were_trained_with():
    assert ClipReward(model="ViT-B-32", pretrained="openai")._source(open_clip) == ("ViT-B-32", "ViT-B-32/openai", True)
    assert ClipReward(model="ViT-H-14", pretrained="laion2b_s32b_b79k")._source(open_clip)[2] is False
