"""ImageReward and the two aesthetic predictors on small random checkpoints with the published names."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from published import LAION_LAYERS, PROMPTS, STEP, V25_LAYERS, apply_head, head, images, pil
from safetensors import safe_open
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch.nn.functional import gelu, layer_norm, linear
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor
from transformers import (
    BertTokenizerFast,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from sd3_adrpo.choices import dataclass_of
from sd3_adrpo.errors import UserError
from sd3_adrpo.rewards.aesthetic import AestheticReward
from sd3_adrpo.rewards.image_reward import ImageRewardReward
from sd3_adrpo.rewards.siglip_aesthetic import SiglipAestheticReward

SIZE, WIDTH, HIDDEN, DEPTH = 32, 128, 64, 2  # BLIP: widths of vision and text, attention heads of 64
BERT = "blip.text_encoder."
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def _random(state: dict, name: str, *shape: int) -> None:
    state[name] = torch.randn(shape, generator=torch.Generator().manual_seed(len(state))) * 0.2


def _blip_vision() -> torch.nn.Module:
    """BLIP's vision transformer is timm's, and so are its names."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.models.VisionTransformer(
            SIZE, 8, embed_dim=WIDTH, depth=DEPTH, num_heads=2, num_classes=0, global_pool=""
        ).eval()


def _published_image_reward(vocabulary: int) -> dict[str, torch.Tensor]:
    state = {f"blip.visual_encoder.{name}": value for name, value in _blip_vision().state_dict().items()}
    _random(state, BERT + "embeddings.word_embeddings.weight", vocabulary, HIDDEN)
    _random(state, BERT + "embeddings.position_embeddings.weight", 40, HIDDEN)
    state[BERT + "embeddings.position_ids"] = torch.arange(40)[None]
    norms, layers = ["embeddings.LayerNorm"], []
    for i in range(DEPTH):
        layer = f"encoder.layer.{i}."
        for block, source in (("attention", HIDDEN), ("crossattention", WIDTH)):
            layers += [(f"{layer}{block}.self.query", HIDDEN, HIDDEN), (f"{layer}{block}.output.dense", HIDDEN, HIDDEN)]
            layers += [(f"{layer}{block}.self.{part}", HIDDEN, source) for part in ("key", "value")]
            norms.append(f"{layer}{block}.output.LayerNorm")
        layers += [(layer + "intermediate.dense", 96, HIDDEN), (layer + "output.dense", HIDDEN, 96)]
        norms.append(layer + "output.LayerNorm")
    for name, rows, columns in layers:
        _random(state, f"{BERT}{name}.weight", rows, columns)
        _random(state, f"{BERT}{name}.bias", rows)
    for name in norms:
        _random(state, f"{BERT}{name}.weight", HIDDEN)
        _random(state, f"{BERT}{name}.bias", HIDDEN)
    for name, width in (("vision_proj", WIDTH), ("text_proj", HIDDEN)):  # of BLIP's pretraining, unused here
        _random(state, f"blip.{name}.weight", 16, width)
    return state | head("mlp.layers", LAION_LAYERS, HIDDEN)


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ImageReward.pt and a small BERT tokenizer."""
    path = tmp_path_factory.mktemp("image_reward")
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] a red cube two blue balls left of cafe".split()
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    BertTokenizerFast(tokenizer_object=tokenizer, vocab={w: i for i, w in enumerate(words)}).save_pretrained(path)
    torch.save(_published_image_reward(len(words)), path / "ImageReward.pt")
    return path


def _openai_transform(batch: torch.Tensor, size: int = SIZE) -> torch.Tensor:
    """On PIL images, as ImageReward, LAION's predictor and OpenAI's CLIP have it."""
    bicubic = Resize(size, InterpolationMode.BICUBIC)
    steps = Compose([bicubic, CenterCrop(size), ToTensor(), Normalize(MEAN, STD)])
    return torch.stack([steps(image) for image in pil(batch)])


def _blip_text(state: dict, ids: torch.Tensor, mask: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
    """BLIP's text encoder written out (its med.py): every token sees every token, then the patches."""

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, x.shape[-1:], state[f"{BERT}{name}.weight"], state[f"{BERT}{name}.bias"], 1e-12)

    def dense(name: str, x: torch.Tensor) -> torch.Tensor:
        return linear(x, state[f"{BERT}{name}.weight"], state[f"{BERT}{name}.bias"])

    def attend(name: str, x: torch.Tensor, seen: torch.Tensor, bias: torch.Tensor | float) -> torch.Tensor:
        query, key, value = (
            dense(f"{name}.self.query", x),
            dense(f"{name}.self.key", seen),
            dense(f"{name}.self.value", seen),
        )  # one attention head of 64
        weights = (query @ key.transpose(1, 2) / 8 + bias).softmax(-1)
        return norm(f"{name}.output.LayerNorm", dense(f"{name}.output.dense", weights @ value) + x)

    x = state[BERT + "embeddings.word_embeddings.weight"][ids]
    x = norm("embeddings.LayerNorm", x + state[BERT + "embeddings.position_embeddings.weight"][: ids.shape[1]])
    for i in range(DEPTH):
        layer = f"encoder.layer.{i}."
        x = attend(layer + "attention", x, x, (1 - mask[:, None].float()) * -10000)
        x = attend(layer + "crossattention", x, patches, 0.0)
        wide = gelu(dense(layer + "intermediate.dense", x))
        x = norm(layer + "output.LayerNorm", dense(layer + "output.dense", wide) + x)
    return x


def test_image_reward_is_blips_forward_pass_written_out(blip):
    scorer = ImageRewardReward(model=str(blip), tokenizer=str(blip), batch_size=2).load()
    state, batch = torch.load(blip / "ImageReward.pt", weights_only=True), images(48)
    tokens = BertTokenizerFast.from_pretrained(blip)(
        [prompt.text for prompt in PROMPTS], padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    assert tokens.input_ids.shape == (3, 35) and tokens.input_ids[0, :5].tolist() == [2, 5, 6, 7, 3]
    with torch.no_grad():
        patches = _blip_vision()(scorer.preprocess((batch * 255).round().to(torch.uint8), "cpu"))
        first = _blip_text(state, tokens.input_ids, tokens.attention_mask, patches)[:, 0]
        expected = (apply_head(state, "mlp.layers", LAION_LAYERS, first) - 0.16717362830052426) / 1.0333394966054072
    rewards = scorer(batch, PROMPTS)
    assert ((rewards - expected).abs() / expected.abs().clamp(min=1)).max() < 1e-4
    assert rewards.std() > 1e-3 and scorer.encoder == "ImageReward.pt"


@pytest.mark.parametrize("height, width", [(32, 32), (64, 64), (20, 20), (63, 96)])
def test_image_rewards_preprocessing_is_the_published_one_to_one_step_of_8_bits(blip, height, width):
    scorer, batch = ImageRewardReward(model=str(blip), tokenizer=str(blip)).load(), images(height, width)
    found, expected = scorer.preprocess((batch * 255).round().to(torch.uint8), "cpu"), _openai_transform(batch)
    assert found.shape == expected.shape
    assert ((found - expected) * torch.tensor(STD)[:, None, None]).abs().max() < STEP


@pytest.mark.parametrize(
    "name",
    [
        "blip.visual_encoder.blocks.1.attn.proj.bias",
        "blip.text_encoder.encoder.layer.1.crossattention.self.key.weight",
        "mlp.layers.7.weight",
    ],
)
def test_image_reward_refuses_incomplete_weights(blip, tmp_path, name):
    state = torch.load(blip / "ImageReward.pt", weights_only=True)
    del state[name]
    torch.save(state, tmp_path / "ImageReward.pt")
    with pytest.raises(UserError, match="ImageReward.pt"):
        ImageRewardReward(model=str(tmp_path), tokenizer=str(blip)).load()


def test_other_weights_are_not_taken_for_image_reward(tmp_path, blip):
    torch.save(head("layers", LAION_LAYERS, 12), tmp_path / "ImageReward.pt")
    with pytest.raises(UserError, match="no blip.visual_encoder"):
        ImageRewardReward(model=str(tmp_path), tokenizer=str(blip)).load()


@pytest.fixture(scope="module")
def clip_vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip_vision")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = CLIPVisionConfig(image_size=SIZE, patch_size=8, projection_dim=12, **sizes)
        CLIPVisionModelWithProjection(config).save_pretrained(path)
    torch.save(head("layers", LAION_LAYERS, 12), path / "sac+logos+ava1-l14-linearMSE.pth")
    return path


def test_aesthetic_is_the_published_head_on_the_unit_embedding(clip_vision):
    scorer, batch = AestheticReward(model=str(clip_vision), head=str(clip_vision)).load(), images(SIZE)
    model = CLIPVisionModelWithProjection.from_pretrained(clip_vision).eval()
    with torch.no_grad():
        embedding = model(pixel_values=_openai_transform(batch)).image_embeds
    expected = apply_head(
        head("layers", LAION_LAYERS, 12), "layers", LAION_LAYERS, embedding / embedding.norm(dim=1, keepdim=True)
    )
    assert (scorer(batch, PROMPTS) - expected).abs().max() < 1e-3
    assert torch.equal(scorer(batch, PROMPTS), scorer(batch, PROMPTS[::-1]))  # the prompt plays no part
    assert "1 to 10" in scorer.unit


def test_a_head_of_another_encoder_is_refused(clip_vision, tmp_path):
    file = tmp_path / "head.pth"
    torch.save(head("layers", LAION_LAYERS, 13), file)
    with pytest.raises(UserError, match="takes embeddings of 13 numbers.*gives 12"):
        AestheticReward(model=str(clip_vision), head=str(file)).load()
    torch.save(head("scoring_head", V25_LAYERS, 12), file)
    with pytest.raises(UserError, match="no head layers.N.weight.*scoring_head.0.weight"):
        AestheticReward(model=str(clip_vision), head=str(file)).load()


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole SigLIP, as it is published: text tower and logit scale beside the vision tower."""
    path = tmp_path_factory.mktemp("siglip")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = SiglipVisionConfig(image_size=SIZE, patch_size=8, **sizes)
    text = SiglipTextConfig(vocab_size=30, max_position_embeddings=8, projection_size=16, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        SiglipModel(SiglipConfig(text_config=text.to_dict(), vision_config=vision.to_dict())).save_pretrained(path)
    SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE}).save_pretrained(path)
    state = {name: value.bfloat16() for name, value in head("scoring_head", V25_LAYERS, 16).items()}  # as published
    torch.save(state, path / "aesthetic_predictor_v2_5.pth")
    return path


def test_siglip_aesthetic_is_the_published_head_on_the_unit_pooled_embedding(siglip):
    with safe_open(siglip / "model.safetensors", "pt") as file:  # the published names
        assert {"vision_model.head.probe", "text_model.head.weight", "logit_scale"} <= set(file.keys())
    scorer, batch = SiglipAestheticReward(model=str(siglip), head=str(siglip)).load(), images(SIZE)
    model, processor = SiglipModel.from_pretrained(siglip).eval(), SiglipImageProcessorPil.from_pretrained(siglip)
    with torch.no_grad():
        pixels = processor(images=pil(batch), return_tensors="pt").pixel_values
        pooled = model.vision_model(pixel_values=pixels).pooler_output
    state = {name: value.bfloat16().float() for name, value in head("scoring_head", V25_LAYERS, 16).items()}
    expected = apply_head(state, "scoring_head", V25_LAYERS, pooled / pooled.norm(dim=1, keepdim=True))
    assert (scorer(batch, PROMPTS) - expected).abs().max() < 1e-3


@pytest.mark.parametrize("height, width", [(64, 64), (63, 96)])
def test_siglips_preprocessing_squeezes_as_its_pil_path_to_one_step_of_8_bits(siglip, height, width):
    scorer, batch = SiglipAestheticReward(model=str(siglip), head=str(siglip)).load(), images(height, width)
    expected = SiglipImageProcessorPil.from_pretrained(siglip)(images=pil(batch), return_tensors="pt").pixel_values
    found = scorer.preprocess((batch * 255).round().to(torch.uint8), "cpu")
    assert ((found - expected) * 0.5).abs().max() < STEP


@pytest.mark.parametrize(
    "reward, option",
    [
        (AestheticReward(head="nobody/nothing"), "head"),
        (SiglipAestheticReward(head="nobody/nothing"), "head"),
        (ImageRewardReward(), "model"),
    ],
)
def test_without_the_hub_the_error_names_the_option(reward, option):
    with pytest.raises(UserError, match=f"reward.{option} .*does not load.*hf download"):
        reward.load()


@pytest.mark.parametrize(
    "name", ["pickscore", "hpsv2", "image_reward", "aesthetic", "siglip_aesthetic", "detector", "vqa"]
)
def test_a_path_that_is_not_there_is_found_before_anything_loads(name, tmp_path):
    published = dataclass_of("reward", name)
    published().describe()  # a hub id is not asked for
    published(model=str(tmp_path)).describe()
    for model in ("./nowhere", str(tmp_path / "nowhere"), "weights.safetensors", "a/b/c", "~/nowhere_at_all"):
        with pytest.raises(UserError, match="reward.model '.*' is not there"):
            published(model=model).describe()


def test_a_head_that_is_not_there_is_found_before_anything_loads():
    for published in (AestheticReward, SiglipAestheticReward):
        with pytest.raises(UserError, match="reward.head 'head.pth' is not there"):
            published(head="head.pth").describe()


def test_an_address_that_cannot_be_reached_tells_how_to_bring_the_file(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match="curl -L -o sac.*--reward.head"):
        AestheticReward(head="http://127.0.0.1:9/x.pth").load()
