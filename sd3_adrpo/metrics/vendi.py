"""Vendi score: the effective number of different images. Friedman and Dieng, arXiv 2210.02410."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def vendi(embeddings: Tensor, prompt: Tensor) -> Tensor:
    """exp of the entropy of the eigenvalues of K / n, K the cosines of a prompt's n images; (prompts,) float64.

    Between 1 (all alike) and n (all orthogonal), so it is comparable at equal n only: state n beside it. NaN for one.
    `embeddings` (B, E) of any length, `prompt` (B,).
    """
    embeddings, prompt = F.normalize(embeddings.double().cpu(), dim=-1), prompt.cpu()
    scores = []
    for index in prompt.unique():
        rows = embeddings[prompt == index]
        if len(rows) < 2:
            scores.append(torch.tensor(float("nan"), dtype=torch.double))
            continue
        eigenvalues = torch.linalg.eigvalsh(rows @ rows.T / len(rows)).clamp(min=0)
        scores.append(torch.special.entr(eigenvalues).sum().exp())
    return torch.stack(scores)
