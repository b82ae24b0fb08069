"""A reward that says the same of every image teaches nothing, in silence: every advantage is 0. Here it is said."""

from __future__ import annotations

import logging

from torch import Tensor

from .scoring import Scoring
from .types import Rollout

logger = logging.getLogger(__name__)

SAME = 1e-6  # of the largest score: what differs by less is the same but for rounding
CHECK = (
    "Check that it looks at the images, that they are not all at the end of its scale (open the grids), and that the "
    "prompts hold what it asks for"
)


class FlatRewards:
    """Warns once per reward, in the first epoch where it is constant."""

    def __init__(self) -> None:
        self.warned: set[str] = set()

    def warn(self, scorer: Scoring, rollout: Rollout, advantage: Tensor) -> None:
        """`advantage` (B,) is what the rewards came to: it is 0 too where they differ between prompts only."""
        if not rollout.scores:  # pairs of a file have none
            return
        flat = [key for key in scorer.weights if _constant(rollout.scores[key])]
        for key in flat:
            effect = "nothing is learnt" if len(flat) == len(scorer.weights) else "it adds nothing to the others"
            count, value = len(rollout.rewards), rollout.scores[key][0].item()
            self._say(key, f"is {value:g} for all {count} images of an epoch: {effect}. {CHECK}")
        if not flat and not advantage.abs().max() > SAME:
            self._say(
                ", ".join(scorer.weights),
                "gives all images of a prompt the same score: nothing is learnt where images of one prompt are "
                "compared. " + CHECK,
            )

    def _say(self, key: str, what: str) -> None:
        if key not in self.warned:
            self.warned.add(key)
            logger.warning("the reward %s %s", key.replace("reward/", ""), what)


def _constant(scores: Tensor) -> bool:
    return bool(scores.max() - scores.min() <= SAME * scores.abs().max())
