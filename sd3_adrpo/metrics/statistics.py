"""Means and paired differences with their standard errors, clustered by prompt."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def mean_and_stderr(values: Tensor, cluster: Tensor | None = None) -> dict[str, float | None]:
    """{"mean", "stderr"} of `values` (B,), NaNs left out; None where there are too few values for it.

    `cluster` (B,) names the values that share something, here a prompt: they count as dependent,
        stderr^2 = G / (G - 1) sum over the G clusters of (sum of its residuals)^2 / B^2,
    which is std / sqrt(B) for clusters of one and std of the clusters' means / sqrt(G) for clusters of one size.
    """
    known = ~values.isnan()
    values = values[known].double()
    if not len(values):
        return {"mean": None, "stderr": None}
    group = torch.arange(len(values)) if cluster is None else cluster[known].unique(return_inverse=True)[1]
    residuals = torch.zeros(int(group.max()) + 1, dtype=torch.double).index_add_(0, group, values - values.mean())
    clusters = len(residuals)
    stderr = None
    if clusters > 1:
        stderr = math.sqrt(clusters / (clusters - 1) * residuals.square().sum().item()) / len(values)
    return {"mean": values.mean().item(), "stderr": stderr}


def paired_difference(before: Tensor, after: Tensor, prompt: Tensor | None = None) -> dict[str, float | None]:
    """{"mean", "stderr"} of after - before, (B,) each, where row i of both comes from the same noise.

    Pairing removes what the noise alone decides. With `prompt` (B,) the error is clustered by prompt, because several
    images of one prompt gain or lose together: it is the error for other prompts of this kind, not only other noise.
    """
    return mean_and_stderr(after.double() - before.double(), prompt)
