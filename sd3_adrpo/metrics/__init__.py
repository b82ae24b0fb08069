"""What is measured beside the reward: a small file each, defined with sources in docs/metrics.md."""

from .diversity import clip_diversity, pairwise_diversity
from .drift import DRIFT_SIGMAS, compare_velocities, w2_drift
from .statistics import mean_and_stderr, paired_difference

__all__ = ["DRIFT_SIGMAS", "clip_diversity", "compare_velocities", "mean_and_stderr", "paired_difference"]
__all__ += ["pairwise_diversity", "w2_drift"]
