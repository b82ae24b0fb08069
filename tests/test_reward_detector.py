"""The detector reward: GenEval's rules on boxes made by hand, and small random detectors through the loading code."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from published import images
from transformers import (
    DetrConfig,
    DetrForObjectDetection,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    ResNetConfig,
    SwinConfig,
)
from transformers.models.detr.image_processing_detr import DetrImageProcessor
from transformers.models.mask2former.image_processing_mask2former import Mask2FormerImageProcessor

from sd3_adrpo.prompts import Prompt
from sd3_adrpo.rewards._detection import Detection, _instances, detections, relations
from sd3_adrpo.rewards.clip import RewardError
from sd3_adrpo.rewards.detector import COLOURS, DetectorReward, DetectorScorer, checks, crop

LABELS = {0: "cat", 1: "dog", 2: "mouse"}


def _prompt(tag: str = "two_object", **record) -> Prompt:
    return Prompt("a photo", category=tag, metadata={"tag": tag, "prompt": "a photo", **record})


def test_prompts_without_a_record_are_refused_before_anything_loads():
    reward = DetectorReward()
    reward.check_prompts([_prompt(include=[{"class": "cat", "count": 1}])])
    with pytest.raises(RewardError, match="no GenEval record for the prompt 'a photo'"):
        reward.check_prompts([_prompt(include=[{"class": "cat", "count": 1}]), Prompt("a photo")])


def _at(x: float, y: float, size: float = 10.0, label: int = 0, score: float = 0.9) -> Detection:
    return Detection(label, score, (x - size / 2, y - size / 2, x + size / 2, y + size / 2))


@pytest.mark.parametrize(
    "x, y, expected",
    [
        (-30, 0, {"left of"}),
        (30, 0, {"right of"}),
        (0, -30, {"above"}),
        (0, 30, {"below"}),
        (-30, -30, {"left of", "above"}),  # (30 - 2) / 42.4 = 0.66 on both axes
        (-30, 17, {"left of"}),  # (17 - 2) / 34.5 = 0.43 is too little
        (1.9, 0, set()),  # within a tenth of both sizes
        (3, 0, set()),  # (3 - 2) / 3 = 0.33
        (4.1, 0, {"right of"}),  # (4.1 - 2) / 4.1 = 0.51
        (0, 0, set()),
    ],
)
def test_relations_follow_genevals_formula(x, y, expected):
    assert relations(_at(x, y).box, _at(0, 0).box) == expected


def _checks(found: list[Detection], record: dict, colour: str = "red") -> list[bool]:
    by_name: dict[str, list[Detection]] = {}
    for detection in found:
        by_name.setdefault(LABELS[detection.label], []).append(detection)
    return checks(by_name, record, lambda detection, name: colour)


def test_counts_must_be_met_and_not_exceeded():
    record = {"include": [{"class": "cat", "count": 2}], "exclude": [{"class": "cat", "count": 3}]}
    cats = [_at(20 * i, 0) for i in range(4)]
    assert [_checks(cats[:n], record) for n in range(4)] == [
        [False, True],
        [False, True],
        [True, True],
        [True, False],
    ]


def test_colours_count_only_on_enough_objects():
    record = {"include": [{"class": "cat", "count": 1, "color": "red"}]}
    assert _checks([_at(0, 0)], record) == [True, True]
    assert _checks([_at(0, 0)], record, colour="blue") == [True, False]
    assert _checks([], record) == [False, False]


def test_positions_are_those_of_the_second_to_the_first():
    record = {"include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}]}
    dog, left, right = _at(0, 0, label=1), _at(-30, 0), _at(30, 0)
    assert _checks([dog, left], record) == [True, True, True]
    assert _checks([dog, right], record) == [True, True, False]
    assert _checks([left], record) == [False, True, False]  # no dog to be left of
    assert _checks([dog], record) == [True, False, False]
    assert _checks([dog, left, right], record) == [True, True, True]  # the most confident cat counts


def test_genevals_names_of_a_class_are_cocos():
    assert _checks([_at(0, 0, label=2)], {"include": [{"class": "computer mouse", "count": 1}]}) == [True]


def test_instances_are_read_as_mmdet_does():
    """Two queries; the first sure of a dog with a mask of logit 2 on the left half, the second sure of nothing."""
    classes = torch.tensor([[0.0, math.log(8), 0.0], [-9.0, -9.0, 9.0]])  # dog: 8 / (1 + 8 + 1) = 0.8; the last: none
    masks = torch.full((2, 4, 4), -2.0)
    masks[0, :, :2] = 2.0
    found = _instances(classes, masks, (8, 8), (8, 8), (16, 16), 0.3)
    assert len(found) == 1 and found[0].label == 1
    # between a pixel column of 2 and one of -2 the logits are interpolated, so the mean is below sigmoid(2) = 0.88
    assert 0.8 * 0.6 < found[0].score < 0.8 * 0.8808
    assert found[0].box == (0, 0, 8, 16) and found[0].mask[:, :8].all() and not found[0].mask[:, 8:].any()
    assert found[0].score == pytest.approx(0.8 * _mean_inside(masks[0]), abs=1e-5)


def _mean_inside(mask: torch.Tensor) -> float:
    for size in (8, 16):
        mask = torch.nn.functional.interpolate(mask[None, None], (size, size), mode="bilinear")[0, 0]
    return mask[mask > 0].sigmoid().mean().item()


def test_padding_of_the_input_is_cut_off():
    masks = torch.full((1, 4, 4), -5.0)
    masks[0, :2] = 5.0  # the upper half of the padded input, which is all of the image
    found = _instances(torch.tensor([[9.0, 0.0]]), masks, (8, 8), (4, 8), (10, 20), 0.3)
    assert found[0].box == (0, 0, 20, 10)


def test_crops_are_on_grey_and_never_empty():
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:4, 2:4] = True
    cut = crop(image, Detection(0, 0.9, (1, 2, 4, 4), mask))
    assert cut.shape == (3, 2, 3) and cut[0].tolist() == [[0x99, 0, 0], [0x99, 0, 0]]
    assert crop(image, Detection(0, 0.9, (-3.0, 7.9, -1.0, 12.0))).shape == (3, 1, 1)


SIZES = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
SIZES |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_queries": 6}


@pytest.fixture(scope="module")
def detr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("detr")
    resnet = {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "out_features": ["stage4"]}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = DetrConfig(
            use_timm_backbone=False,
            backbone=None,
            use_pretrained_backbone=False,
            backbone_config=ResNetConfig(**resnet),
            id2label=LABELS,
            **SIZES,
        )
        DetrForObjectDetection(config).save_pretrained(path)
    DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def mask2former(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mask2former")
    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin = SwinConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, out_features=stages)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Mask2FormerConfig(
            backbone_config=swin, id2label=LABELS, feature_size=32, mask_feature_size=32, hidden_dim=32,
            encoder_feedforward_dim=16, dim_feedforward=16, encoder_layers=1, decoder_layers=2,
            num_attention_heads=2, num_queries=6,
        )  # fmt: skip
        Mask2FormerForUniversalSegmentation(config).save_pretrained(path)
    Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}, size_divisor=32).save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", ["detr", "mask2former"])
def test_detectors_load_and_score(kind, request):
    folder = request.getfixturevalue(kind)
    options = {"threshold": 0.05, "clip": "shapes", "clip_pretrained": None, "batch_size": 2}
    scorer = DetectorReward(model=str(folder), partial_credit=True, **options).load()
    assert not scorer.model.training and scorer.encoder == str(folder)
    batch = images(48, 64)
    found = detections(scorer.model, scorer.processor, (batch * 255).byte(), 0.05, "cpu")
    assert len(found) == 3 and any(found)
    assert all(0.05 < one.score <= 1 and one.label in LABELS for row in found for one in row)
    assert all((one.mask is not None) == (kind == "mask2former") for row in found for one in row)
    clauses = [{"class": name, "count": 1, "color": "red"} for name in ("cat", "dog")]
    rewards = scorer(batch, [_prompt(include=clauses)] * 3)
    assert set(rewards.mul(4).tolist()) <= {0.0, 1.0, 2.0, 3.0, 4.0} and rewards.dtype == torch.float32
    strict = DetectorReward(model=str(folder), **options).load()
    assert torch.equal(strict(batch, [_prompt(include=clauses)] * 3), (rewards == 1).float())


class Eyes:
    """Stands for CLIP: an image's embedding is the colour it is, a text's the colour it names."""

    def embed_images(self, batch):
        red = batch[:, 0].float().mean((1, 2)) > batch[:, 2].float().mean((1, 2))
        return torch.eye(len(COLOURS))[[COLOURS.index("red" if one else "blue") for one in red]]

    def embed_texts(self, texts):
        named = [next(i for i, colour in enumerate(COLOURS) if f" {colour}" in text) for text in texts]
        return torch.eye(len(COLOURS))[named]


@pytest.fixture
def scorer(detr, monkeypatch) -> DetectorScorer:
    model = DetrForObjectDetection.from_pretrained(detr)
    return DetectorScorer(model, None, Eyes(), DetectorReward(model="m"))


def test_colours_and_thresholds_end_to_end(scorer, monkeypatch):
    """A red cat on the left and a blue dog on the right, the dog with too little confidence to be counted."""
    image = torch.zeros(1, 3, 20, 40, dtype=torch.uint8)
    image[:, 0, :, :20], image[:, 2, :, 20:] = 255, 255
    found = [Detection(0, 0.95, (0, 0, 20, 20)), Detection(1, 0.6, (20, 0, 40, 20))]
    monkeypatch.setattr("sd3_adrpo.rewards.detector.detections", lambda *_: [found])
    red_cat, blue_dog = {"class": "cat", "count": 1, "color": "red"}, {"class": "dog", "count": 1, "color": "blue"}
    assert scorer(image, [_prompt(include=[red_cat, blue_dog])]).tolist() == [1]
    assert scorer(image, [_prompt(include=[{**red_cat, "color": "blue"}])]).tolist() == [0]
    for relation, reward in (("right of", 1), ("left of", 0)):
        include = [red_cat, {**blue_dog, "position": [relation, 0]}]
        assert scorer(image, [_prompt(include=include)]).tolist() == [reward]
    assert scorer(image, [_prompt(tag="counting", include=[{"class": "dog", "count": 1}])]).tolist() == [0]


def test_prompts_without_a_record_or_with_a_strange_class_are_refused(scorer):
    with pytest.raises(RewardError, match="no GenEval record for the prompt 'a cat'.*evaluation_metadata.jsonl"):
        scorer(images(8, count=1), [Prompt("a cat")])
    with pytest.raises(RewardError, match="'unicorn', which m does not detect; it knows cat, dog, mouse"):
        scorer(images(8, count=1), [_prompt(include=[{"class": "unicorn", "count": 1}])])
