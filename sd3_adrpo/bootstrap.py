"""Bootstrap intervals over prompts. Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 13 and 14.

A prompt is what a new user brings, so prompts are resampled, each with all its images. Every metric here is a ratio of
sums over prompts, sum of numerators / sum of denominators (a mean has the count of values as its denominator). Base and
LoRA, all metrics and all runs see the same resamples, so that a difference keeps its pairing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES, SEED = 2000, 0


@dataclass(frozen=True)
class Interval:
    """A value with its percentile interval; None where fewer than two prompts speak to it."""

    mean: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Ratio:
    """A metric by prompt, (N,) each: a prompt without a value has 0 and 0."""

    numerator: np.ndarray
    denominator: np.ndarray

    @classmethod
    def of(cls, values: Sequence[float | None], prompts: int, weights: Sequence[float | None] | None = None) -> Ratio:
        """From values of images (N K, those of a prompt in a row) or of prompts (N,); None and NaN are left out."""
        rows = np.array([np.nan if value is None else value for value in values], dtype=float).reshape(prompts, -1)
        known = ~np.isnan(rows)
        weight = np.ones_like(rows)
        if weights is not None:
            weight = np.array([np.nan if value is None else value for value in weights], dtype=float).reshape(
                rows.shape
            )
        weight = np.where(known, weight, 0.0)
        return cls((np.where(known, rows, 0.0) * weight).sum(1), weight.sum(1))

    @property
    def mean(self) -> float | None:
        total = self.denominator.sum()
        return float(self.numerator.sum() / total) if total else None

    def only(self, prompts: Sequence[int]) -> Ratio:
        """Of these prompts alone."""
        return Ratio(self.numerator[list(prompts)], self.denominator[list(prompts)])

    def _draws(self, counts: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return (counts @ self.numerator) / (counts @ self.denominator)


def _counts(prompts: int, resamples: int, seed: int) -> np.ndarray:
    """(R, N) how often each prompt is in each resample; the same for the same N and seed."""
    return np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), resamples).astype(float)


def interval(
    after: Ratio, before: Ratio | None = None, level: float = 0.95, resamples: int = RESAMPLES, seed: int = SEED
) -> Interval | None:
    """Of `after`, or of after - before by the same resamples; None where there is no value at all."""
    sides = [after] if before is None else [after, before]
    means = [side.mean for side in sides]
    if any(mean is None for mean in means):
        return None
    mean = means[0] - (means[1] if before is not None else 0.0)
    if min(np.count_nonzero(side.denominator) for side in sides) < 2:
        return Interval(mean)
    counts = _counts(len(after.numerator), resamples, seed)
    draws = sides[0]._draws(counts) - (sides[1]._draws(counts) if before is not None else 0.0)
    draws = draws[~np.isnan(draws)]  # a resample without any prompt that has the metric says nothing
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high))
