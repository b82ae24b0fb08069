"""PickScore and HPSv2.1 on small random checkpoints, against the steps that their authors publish."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from published import PROMPTS, STEP, images, pil
from tiny import clip_tokenizer
from torchvision.transforms import Compose, InterpolationMode, Normalize, Resize, ToTensor
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from sd3_adrpo.errors import UserError
from sd3_adrpo.rewards import hpsv2
from sd3_adrpo.rewards.clip import RewardError
from sd3_adrpo.rewards.hpsv2 import Hpsv2Reward
from sd3_adrpo.rewards.pickscore import PickscoreReward

SIZE = 32
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(scope="module")
def pickscore(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, tokenizer = tmp_path_factory.mktemp("pickscore"), clip_tokenizer()
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=16, hidden_act="gelu", **ends, **sizes)
    vision = CLIPVisionConfig(image_size=SIZE, patch_size=8, hidden_act="gelu", **sizes)
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12, logit_scale_init_value=4.6052
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SIZE).save_pretrained(path)
    return path


def test_pickscore_is_the_authors_example(pickscore):
    """The steps of "Inference with PickScore" in the authors' README."""
    scorer = PickscoreReward(model=str(pickscore)).load()
    model, tokenizer = CLIPModel.from_pretrained(pickscore).eval(), clip_tokenizer()
    processor = CLIPImageProcessorPil.from_pretrained(pickscore)
    batch = images(SIZE)
    with torch.no_grad():
        image = model.get_image_features(**processor(images=pil(batch), return_tensors="pt")).pooler_output
        text = [tokenizer(prompt.text, truncation=True, max_length=16, return_tensors="pt") for prompt in PROMPTS]
        text = torch.cat([model.get_text_features(**tokens).pooler_output for tokens in text])
        image, text = (x / torch.norm(x, dim=-1, keepdim=True) for x in (image, text))
        expected = model.logit_scale.exp() * (text @ image.T).diagonal()
    rewards = scorer(batch, PROMPTS)
    assert (rewards - expected).abs().max() < 1e-4
    assert rewards.dtype == torch.float32 and rewards.device.type == "cpu"
    assert model.logit_scale.exp().item() == pytest.approx(100, abs=0.01)  # so that the unit is about 20
    assert scorer.unit.startswith("logit scale x cosine") and scorer.encoder == str(pickscore)
    assert not scorer.model.training


def test_pickscores_checkpoint_has_the_published_names(pickscore):
    from safetensors import safe_open

    with safe_open(pickscore / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {"logit_scale", "visual_projection.weight", "text_projection.weight"} <= names
    assert "vision_model.encoder.layers.0.self_attn.k_proj.weight" in names


@pytest.mark.parametrize("height, width", [(32, 32), (64, 64), (20, 20), (63, 96), (96, 61)])
def test_pickscores_preprocessing_is_transformers_pil_path_to_one_step_of_8_bits(pickscore, height, width):
    """Whose crop of an odd margin is torchvision's shifted by one pixel."""
    batch = images(height, width)
    expected = CLIPImageProcessorPil.from_pretrained(pickscore)(images=pil(batch), return_tensors="pt").pixel_values
    scorer = PickscoreReward(model=str(pickscore)).load()
    found = scorer.preprocess((batch * 255).round().to(torch.uint8), "cpu")
    assert found.shape == expected.shape == (3, 3, SIZE, SIZE)
    assert ((found - expected) * torch.tensor(STD)[:, None, None]).abs().max() < STEP


def test_batches_do_not_matter_and_broken_images_name_their_prompt(pickscore):
    scorer, batch = PickscoreReward(model=str(pickscore), batch_size=2).load(), images(SIZE)
    assert torch.allclose(scorer(batch, PROMPTS), PickscoreReward(model=str(pickscore)).load()(batch, PROMPTS))
    batch[1, 0, 0, 0] = float("nan")
    with pytest.raises(RewardError, match="nan for 1 of 3 images, with the prompts 'two blue"):
        scorer(batch, PROMPTS)
    with pytest.raises(ValueError, match="3 images came with 2 prompts"):
        scorer(batch, PROMPTS[:2])


@pytest.mark.parametrize("reward", [PickscoreReward(), Hpsv2Reward()])
def test_without_the_hub_the_error_says_what_to_do(reward):
    with pytest.raises(UserError, match=f"reward.model {reward.model} does not load.*hf download {reward.model}"):
        reward.load()


@pytest.fixture(scope="module")
def hps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a checkpoint of HPSv2's form, and open_clip knowing its small architecture."""
    path = tmp_path_factory.mktemp("hps")
    vision = {"image_size": SIZE, "patch_size": 8, "width": 16, "head_width": 8, "layers": 2}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    (path / "tiny-hps.json").write_text(json.dumps({"embed_dim": 12, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(path / "tiny-hps.json")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = open_clip.create_model("tiny-hps", load_weights=False).state_dict()
    torch.save({"epoch": 3, "name": "x", "state_dict": state}, path / "HPS_v2.1_compressed.pt")
    return path


@pytest.fixture
def tiny_architecture(monkeypatch):
    monkeypatch.setattr(hpsv2, "ARCHITECTURE", "tiny-hps")


def _published_transform(batch: torch.Tensor) -> torch.Tensor:
    """HPSv2's evaluation transform: a tensor first, then resized and padded, then normalised."""
    height, width = batch.shape[-2:]
    scale = SIZE / max(height, width)
    new = [round(height * scale), round(width * scale)]
    resized = Compose([ToTensor(), Resize(new, InterpolationMode.BICUBIC)])
    canvas = torch.zeros(len(batch), 3, SIZE, SIZE)
    top, left = (SIZE - new[0]) // 2, (SIZE - new[1]) // 2
    canvas[..., top : top + new[0], left : left + new[1]] = torch.stack([resized(image) for image in pil(batch)])
    return Normalize(MEAN, STD)(canvas)


@pytest.mark.parametrize("height, width", [(32, 32), (64, 64), (20, 20), (63, 96), (96, 61)])
def test_hpsv2s_preprocessing_is_the_published_one(hps, tiny_architecture, height, width):
    batch = images(height, width)
    scorer = Hpsv2Reward(model=str(hps)).load()
    assert (scorer.preprocess(batch) - _published_transform(batch)).abs().max() < 1e-5


def test_hpsv2_is_100_times_the_cosine_without_logit_scale(hps, tiny_architecture):
    scorer = Hpsv2Reward(model=str(hps), batch_size=2).load()
    model, batch = open_clip.create_model("tiny-hps", load_weights=False).eval(), images(64, 48)
    model.load_state_dict(torch.load(hps / "HPS_v2.1_compressed.pt", weights_only=True)["state_dict"])
    tokens = open_clip.get_tokenizer("tiny-hps")([prompt.text for prompt in PROMPTS])
    with torch.no_grad():
        image, text, _ = model(_published_transform(batch), tokens)
    assert (scorer(batch, PROMPTS) - 100 * (image @ text.T).diagonal()).abs().max() < 1e-4
    assert scorer.unit == "100 x cosine" and scorer.encoder == "HPS_v2.1_compressed.pt"


def test_a_file_that_is_not_hpsv2_is_refused(hps, tiny_architecture, tmp_path):
    state = torch.load(hps / "HPS_v2.1_compressed.pt", weights_only=True)["state_dict"]
    state.pop("ln_final.weight")
    torch.save({"state_dict": state}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="lacks ln_final.weight"):
        Hpsv2Reward(model=str(tmp_path / "other.pt")).load()
    with pytest.raises(UserError, match="has no HPS_v2.1_compressed.pt"):
        Hpsv2Reward(model=str(tmp_path)).load()


def test_pickled_code_is_not_run(tmp_path, tiny_architecture):
    class Trap:
        def __reduce__(self):
            return (Path(tmp_path / "ran").write_text, ("x",))

    torch.save({"state_dict": Trap()}, tmp_path / "HPS_v2.1_compressed.pt")
    with pytest.raises(UserError, match="cannot be read as weights"):
        Hpsv2Reward(model=str(tmp_path)).load()
    assert not (tmp_path / "ran").exists()
