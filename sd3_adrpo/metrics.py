"""What is measured beside the reward, and differences with their standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .flow import add_noise, seeded_noise
from .policy import Policy
from .seeds import seed_for
from .types import Condition

DRIFT_SIGMAS = (0.9, 0.7, 0.5, 0.3, 0.1)


def clip_diversity(embeddings: Tensor, prompt: Tensor) -> Tensor:
    """Mean pairwise 1 - cosine of the images of each prompt, (prompts,) float64 in the order of their indices.

    `embeddings` (B, E) of any length, `prompt` (B,). 0: all images alike, 1: orthogonal; NaN for a prompt of one image.
    Where a base draws wrong things it falls by itself when they disappear: read it beside the accuracy.
    """
    embeddings = F.normalize(embeddings.double().cpu(), dim=-1)
    indices, group = prompt.cpu().unique(return_inverse=True)
    count = torch.bincount(group, minlength=len(indices)).double()
    total = torch.zeros(len(indices), embeddings.shape[1], dtype=torch.double).index_add_(0, group, embeddings)
    # |sum of e|^2 = n + the cosines of all ordered pairs
    diversity = 1 - (total.square().sum(-1) - count) / (count * (count - 1))
    return diversity.where(count > 1, math.nan)  # rounding can make 0 / 0 an infinity


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


@torch.no_grad()
def w2_drift(
    policy: Policy,
    clean: Tensor,
    condition: Condition,
    prompt: Tensor,
    seeds: Sequence[int],
    sigmas: Sequence[float] = DRIFT_SIGMAS,
    batch_size: int = 16,
) -> Tensor:
    """|v - v_ref|^2 as a mean over C, h, w and `sigmas`, (B,) float32 on the CPU: how far the policy is from the base.

    At noised `clean` (B, C, h, w), noise from each row's own seed. `condition` (N rows) is picked by `prompt` (B,).
    """
    device = policy.model.device
    per_call = max(1, batch_size // len(sigmas))
    grid, drift = torch.tensor(sigmas), []
    for start in range(0, len(clean), per_call):
        rows = slice(start, start + per_call)
        names = [seed_for(seed, "drift", number) for seed in seeds[rows] for number in range(len(sigmas))]
        noise = seeded_noise(names, clean.shape[1:])
        sigma = grid.repeat(len(noise) // len(grid))
        noisy = add_noise(clean[rows].repeat_interleave(len(grid), 0), noise, sigma).to(device)
        given = condition.select(prompt[rows].repeat_interleave(len(grid))).to(device)
        velocity = policy.velocity(noisy, sigma.to(device), given).float()
        with policy.reference():
            reference = policy.velocity(noisy, sigma.to(device), given).float()
        drift.append((velocity - reference).square().flatten(1).mean(1).view(-1, len(grid)).mean(1).cpu())
    return torch.cat(drift)
