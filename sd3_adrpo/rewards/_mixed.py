"""Several rewards as one option: `--reward clip=1.0,ocr=0.5`. And none, which is what is watched by default."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import UserError
from ..prompts import Prompt


@dataclass
class NoReward:
    """Nothing beside the reward."""

    name: Literal["none"] = "none"

    @property
    def parts(self) -> dict[str, Any]:
        return {}

    @property
    def weights(self) -> dict[str, float]:
        return {}


@dataclass
class MixedReward:
    """A weighted sum of several rewards; each has its own options under its name."""

    name: str = ""  # NAME=WEIGHT,NAME=WEIGHT,...; a weight left out is 1
    # batch: of each score take off its mean, then divide by its standard deviation, over the epoch's images
    normalise: Literal["none", "batch"] = "none"
    parts: dict[str, Any] = field(default_factory=dict)  # the dataclass of each

    @property
    def weights(self) -> dict[str, float]:
        return parse_weights(self.name)

    def describe(self) -> str:
        scores = "score" if self.normalise == "none" else "score in standard deviations"
        return "; ".join(
            f"{weight:g} x {name} {scores} ({self.parts[name].describe()})" for name, weight in self.weights.items()
        )

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        for part in self.parts.values():
            if hasattr(part, "check_prompts"):
                part.check_prompts(prompts)


def is_mixed(name: str) -> bool:
    """Whether the value of `--reward` names several rewards, or one with a weight."""
    return "," in name or "=" in name


def parse_weights(name: str) -> dict[str, float]:
    """{"clip": 1.0, "ocr": 0.5} of "clip=1.0,ocr=0.5" or "clip,ocr=0.5". UserError for what is no such list."""
    weights: dict[str, float] = {}
    for part in name.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        try:
            weight = float(value) if equals else 1.0
        except ValueError:
            weight = float("nan")
        if not key or weight - weight != 0 or key in weights:  # nan and infinities differ from themselves
            what = f"names {key} twice" if key in weights else f"has {part.strip()!r}"
            raise UserError(
                f"reward {name!r} {what}; write NAME=WEIGHT,NAME=WEIGHT with each name once and finite weights, such "
                "as clip=1.0,ocr=0.5"
            )
        weights[key] = weight
    if not any(weights.values()):
        raise UserError(f"reward {name!r} weighs nothing: give one a weight other than 0, and only --watch the others")
    return weights


def named_parts(reward: Any) -> dict[str, Any]:
    """The dataclasses of a reward by name: several of a mix, itself alone otherwise."""
    return {reward.name: reward} if not hasattr(reward, "parts") else reward.parts
