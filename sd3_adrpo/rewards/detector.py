"""Counts, colours and positions of a GenEval prompt file, checked with a detector of transformers.

The checks and thresholds are GenEval's (arXiv 2310.11513), the detector is not the same build of weights (mmdet there):
this is not GenEval's number. That one comes from GenEval's own scorer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..prompts import Prompt
from ._detection import Detection, detections, relations
from ._weights import check_source, loading
from .clip import ClipReward, RewardError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

COLOURS = "red orange yellow green blue purple pink brown black white".split()
COLOUR_TEMPLATES = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")
ALIASES = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}  # GenEval's to COCO's
GREY = 0x99  # paints what is not the object before its colour is read
MOST = 16  # detections of a class, the most confident first


@dataclass
class DetectorReward:
    """GenEval-style checks with a detector: 1 where the image has all that the prompt's record asks for, else 0."""

    name: Literal["detector"] = "detector"
    model: str = "facebook/mask2former-swin-small-coco-instance"  # a folder or hub id; a DETR also fits
    clip: str = "ViT-L-14"  # names the colours, as reward.model of clip
    clip_pretrained: str | None = "openai"  # as reward.pretrained of clip
    threshold: float = 0.3  # confidence from which an object counts
    counting_threshold: float = 0.9  # the same for GenEval's tag `counting`
    partial_credit: bool = False  # the share of checks that pass, instead of all or nothing
    batch_size: int = 8  # images per forward pass

    def describe(self) -> str:
        check_source(self.model, "model")
        return f"{self.unit()}, {self.model}"

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """UserError for a prompt without GenEval's record."""
        for prompt in prompts:
            clauses(prompt)

    def unit(self) -> str:
        return "share of checks passed, 0 to 1" if self.partial_credit else "all checks passed, 0 or 1"

    def load(self, device: str | torch.device = "cpu") -> DetectorScorer:
        """float32 and in evaluation mode, on `device`. UserError where weights cannot be had."""
        from transformers import (
            AutoConfig,
            AutoImageProcessor,
            AutoModelForObjectDetection,
            AutoModelForUniversalSegmentation,
        )

        with loading("model", self.model):
            masks = AutoConfig.from_pretrained(self.model).model_type == "mask2former"
            kind = AutoModelForUniversalSegmentation if masks else AutoModelForObjectDetection
            model = kind.from_pretrained(self.model, dtype="float32")
            processor = AutoImageProcessor.from_pretrained(self.model)
        clip = ClipReward(model=self.clip, pretrained=self.clip_pretrained).load(device)
        return DetectorScorer(model.to(device), processor, clip, self, device)


class DetectorScorer:
    """Needs GenEval's record of every prompt: `include`, `exclude` and `tag`, as in its evaluation_metadata.jsonl."""

    def __init__(
        self, model: Any, processor: Any, clip: Any, config: DetectorReward, device: str | torch.device = "cpu"
    ) -> None:
        self.model, self.processor, self.clip = model.eval().requires_grad_(False), processor, clip
        self.config, self.device = config, device
        self.unit, self.encoder = config.unit(), config.model
        self.labels = {name: index for index, name in model.config.id2label.items()}

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Rewards (B,) of images (B, 3, H, W). RewardError for a prompt without a record, or of an unknown class."""
        from ._scoring import score_in_batches

        for prompt in prompts:
            self._refuse(prompt)
        return score_in_batches(self._score, images, prompts, self.encoder, self.config.batch_size)

    def _refuse(self, prompt: Prompt) -> None:
        unknown = [clause["class"] for clause in clauses(prompt) if coco(clause["class"]) not in self.labels]
        if unknown:
            raise RewardError(
                f"the prompt {prompt.text!r} asks for {unknown[0]!r}, which {self.encoder} does not detect; it knows "
                f"{', '.join(sorted(self.labels))}"
            )

    def _score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        import torch

        floor = min(self.config.threshold, self.config.counting_threshold)
        rewards = []
        for image, prompt, found in zip(
            images, prompts, detections(self.model, self.processor, images, floor, self.device), strict=True
        ):
            passed = checks(self.select(found, prompt.metadata), prompt.metadata, self._colour_of(image))
            rewards.append(sum(passed) / len(passed) if self.config.partial_credit else float(all(passed)))
        return torch.tensor(rewards)

    def select(self, found: list[Detection], record: dict) -> dict[str, list[Detection]]:
        """Those over the threshold by class, the most confident first and at most 16 of each."""
        counting = record.get("tag") == "counting"
        threshold = self.config.counting_threshold if counting else self.config.threshold
        chosen: dict[str, list[Detection]] = {}
        for detection in sorted(found, key=lambda detection: -detection.score):
            chosen.setdefault(self.model.config.id2label[detection.label], [])
            if detection.score > threshold:
                chosen[self.model.config.id2label[detection.label]].append(detection)
        return {name: rows[:MOST] for name, rows in chosen.items()}

    def _colour_of(self, image: Tensor) -> Callable[[Detection, str], str]:
        def colour(detection: Detection, name: str) -> str:
            embedding = self.clip.embed_images(crop(image, detection)[None])
            return COLOURS[(embedding @ self._colours(name).T).argmax().item()]

        return colour

    def _colours(self, name: str) -> Tensor:
        """(10, E): the mean over the templates of each colour's text, of length 1."""
        from torch.nn.functional import normalize

        texts = [template.format(colour, name) for colour in COLOURS for template in COLOUR_TEMPLATES]
        embeddings = self.clip.embed_texts(texts).unflatten(0, (len(COLOURS), len(COLOUR_TEMPLATES)))
        return normalize(embeddings.mean(1), dim=-1)


def clauses(prompt: Prompt) -> list[dict]:
    """What the prompt's record includes and excludes. RewardError where there is none."""
    record = prompt.metadata or {}
    found = [*record.get("include", []), *record.get("exclude", [])]
    if not found:
        raise RewardError(
            f"the detector reward has no GenEval record for the prompt {prompt.text!r}: give --prompts a .jsonl "
            'file whose lines have "tag" and "include", such as GenEval\'s evaluation_metadata.jsonl'
        )
    return found


def coco(name: str) -> str:
    return ALIASES.get(name, name)


def checks(found: dict[str, list[Detection]], record: dict, colour_of: Callable[[Detection, str], str]) -> list[bool]:
    """One truth per requirement: at least so many, of that colour, in that position; and of `exclude`, not so many.

    GenEval's answer is that all hold. Colour and position are read from the most confident `count` objects, and a
    position only from objects that passed the rest.
    """
    passed, groups = [], []
    for clause in record.get("include", []):
        objects = found.get(coco(clause["class"]), [])[: clause["count"]]
        matched = [len(objects) == clause["count"]]
        if "color" in clause:
            colours = [colour_of(detection, clause["class"]) for detection in objects] if matched[0] else []
            matched.append(colours.count(clause["color"]) >= clause["count"])
        if "position" in clause:
            relation, target = clause["position"]
            others = groups[target]
            fits = all(relation in relations(one.box, other.box) for one in objects for other in others or [])
            matched.append(all(matched) and others is not None and fits)
        passed += matched
        groups.append(objects if all(matched) else None)
    for clause in record.get("exclude", []):
        passed.append(len(found.get(coco(clause["class"]), [])) < clause["count"])
    return passed


def crop(image: Tensor, detection: Detection) -> Tensor:
    """The object (3, h, w) of a uint8 image (3, H, W), on grey where it has a mask; at least one pixel."""
    height, width = image.shape[-2:]
    if detection.mask is not None:
        image = image.masked_fill(~detection.mask.to(image.device), GREY)
    left, top, right, bottom = (round(side) for side in detection.box)
    left, top = min(max(left, 0), width - 1), min(max(top, 0), height - 1)
    return image[:, top : max(bottom, top + 1), left : max(right, left + 1)]
