"""Intervals over prompts against values worked out by hand and the normal approximation."""

from __future__ import annotations

import numpy as np
import pytest

from sd3_adrpo.bootstrap import Interval, Ratio, interval


def test_means_leave_out_what_has_no_value():
    ratio = Ratio.of([1.0, None, 3.0, 5.0], prompts=2)
    assert ratio.numerator.tolist() == [1.0, 8.0] and ratio.denominator.tolist() == [1.0, 2.0]
    assert ratio.mean == 3.0
    assert Ratio.of([None, None], prompts=2).mean is None
    weighted = Ratio.of([2.0, float("nan"), 1.0], prompts=3, weights=[3.0, None, 1.0])
    assert weighted.mean == pytest.approx(7 / 4)
    assert ratio.only([1]).mean == 4.0


def test_constant_differences_have_intervals_of_no_width():
    before = Ratio.of([1.0, 5.0, 2.0, 9.0], prompts=4)
    after = Ratio.of([1.5, 5.5, 2.5, 9.5], prompts=4)
    found = interval(after, before)  # unpaired, the spread of the prompts would show
    assert (found.mean, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))
    assert interval(after).high - interval(after).low > 1


def test_interval_of_a_mean_is_the_normal_one():
    values = np.random.default_rng(3).normal(2.0, 1.0, 400)
    found = interval(Ratio.of(values, prompts=400))
    error = 1.96 * values.std() / 20
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - error, abs=0.02)
    assert found.high == pytest.approx(values.mean() + error, abs=0.02)
    assert found == interval(Ratio.of(values, prompts=400))  # seeded


def test_images_of_a_prompt_are_resampled_together():
    prompts = np.random.default_rng(0).normal(0, 1, 50)
    once, often = (interval(Ratio.of(np.repeat(prompts, count), prompts=50)) for count in (1, 16))
    assert (once.low, once.high) == pytest.approx((often.low, often.high))  # copies of an image say nothing new


def test_too_few_prompts():
    assert interval(Ratio.of([1.0, None], prompts=2)) == Interval(1.0)
    assert interval(Ratio.of([None, None], prompts=2)) is None
