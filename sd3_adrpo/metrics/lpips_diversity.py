"""Mean pairwise LPIPS (Zhang et al., arXiv 1801.03924) of the images of a prompt; needs the extra `lpips`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from itertools import combinations

import torch
from torch import Tensor

from ..errors import UserError
from ..rewards.clip import quantise

ALEXNET = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"  # torchvision's, which lpips builds on
Distance = Callable[[Tensor, Tensor], Tensor]  # images in [-1, 1], (n, 3, H, W) twice, to n values in any shape


@cache
def load_lpips(device: str = "cpu") -> Distance:
    """LPIPS with AlexNet, version 0.1, the authors' own package and weights. UserError where either is missing."""
    try:
        import lpips
    except ImportError:
        raise UserError("lpips_diversity needs the package lpips: pip install -e '.[lpips]'") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision's about the way in which lpips asks for AlexNet
            return lpips.LPIPS(net="alex", verbose=False).eval().requires_grad_(False).to(device)
    except (OSError, RuntimeError) as error:  # no network, or a download cut off
        raise UserError(
            f"lpips_diversity: AlexNet does not load: {error}. Bring {ALEXNET} into {torch.hub.get_dir()}/checkpoints"
        ) from error


@torch.no_grad()
def lpips_diversity(images: Tensor, prompt: Tensor, distance: Distance, device: str = "cpu") -> Tensor:
    """(prompts,) float64, in the order of their indices; 0: all alike, NaN for one image. `images` as `quantise`."""
    prompt, values = prompt.cpu(), []
    for index in prompt.unique():
        rows = quantise(images[prompt == index]).to(device).float() / 127.5 - 1
        pairs = torch.tensor(list(combinations(range(len(rows)), 2)), dtype=torch.long).view(-1, 2)
        found = [distance(rows[a], rows[b]).flatten() for a, b in (part.T for part in pairs.split(16)) if len(a)]
        values.append(torch.cat(found).double().mean().cpu() if found else torch.tensor(float("nan")).double())
    return torch.stack(values)
