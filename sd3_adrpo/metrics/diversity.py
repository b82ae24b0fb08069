"""How different the images of one prompt are: mean pairwise distance of unit embeddings.

With a CLIP it is `clip_diversity`, with DINOv2 `dino_diversity`: no text in its training, so it sees style and layout
that a CLIP is blind to.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pairwise_diversity(embeddings: Tensor, prompt: Tensor) -> Tensor:
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
    return diversity.where(count > 1, torch.nan)  # rounding can make 0 / 0 an infinity


clip_diversity = pairwise_diversity  # the name it goes by with a CLIP's embeddings
