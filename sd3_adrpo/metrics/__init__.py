"""What is measured beside the reward; one file each, named after the option of eval/evaluate.py that adds it."""

from .statistics import DRIFT_SIGMAS, clip_diversity, mean_and_stderr, paired_difference, w2_drift

__all__ = ["DRIFT_SIGMAS", "clip_diversity", "mean_and_stderr", "paired_difference", "w2_drift"]
