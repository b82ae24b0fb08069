"""Distances of two sets of images by their features x (n, E) and y (m, E), float64; any embedder gives the features."""

from __future__ import annotations

import torch
from torch import Tensor

CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
NEIGHBOURS = 3


def cmmd(x: Tensor, y: Tensor) -> float:
    """Squared maximum mean discrepancy with a Gaussian kernel of width 10 on unit embeddings, times 1000.

    Jayasumana et al., arXiv 2401.09603, with the estimator of their code, whose means include the diagonal: 0 for equal
    sets. Theirs is on CLIP ViT-L/14 at 336 pixels.
    """
    x, y = (torch.nn.functional.normalize(part.double(), dim=-1) for part in (x, y))

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (-torch.cdist(a, b).square() / (2 * CMMD_SIGMA**2)).exp().mean()

    return CMMD_SCALE * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)).item()


def kid(x: Tensor, y: Tensor) -> float:
    """Kernel Inception distance: unbiased squared MMD with the kernel (a.b / E + 1)^3; it can be below 0.

    Binkowski et al., arXiv 1801.01401. At least two rows in each set.
    """
    x, y = x.double(), y.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / x.shape[1] + 1) ** 3

    def unbiased(a: Tensor) -> Tensor:
        values = kernel(a, a)
        return (values.sum() - values.diagonal().sum()) / (len(a) * (len(a) - 1))

    return (unbiased(x) + unbiased(y) - 2 * kernel(x, y).mean()).item()


def fid(x: Tensor, y: Tensor) -> float:
    """Frechet distance of two Gaussians with the sets' means and covariances. Heusel et al., arXiv 1706.08500.

    |mean - mean'|^2 + tr(C + C' - 2 (C^1/2 C' C^1/2)^1/2). Biased for few images: compare at equal n only.
    """
    x, y = x.double(), y.double()
    root = _square_root(torch.cov(x.T).view(x.shape[1], -1))
    other = torch.cov(y.T).view(y.shape[1], -1)
    cross = torch.linalg.eigvalsh(root @ other @ root).clamp(min=0).sqrt().sum()
    trace = root.square().sum() + other.trace()
    return ((x.mean(0) - y.mean(0)).square().sum() + trace - 2 * cross).item()


def _square_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def precision_recall(x: Tensor, reference: Tensor, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """(share of x within the reference's manifold, share of the reference within that of x).

    A manifold is the union of balls around its points, each reaching its k-th nearest neighbour. Kynkaanniemi et al.,
    arXiv 1904.06991.
    """
    return _inside(x, reference, neighbours), _inside(reference, x, neighbours)


def _inside(points: Tensor, manifold: Tensor, neighbours: int) -> float:
    points, manifold = points.double(), manifold.double()
    own = torch.cdist(manifold, manifold)
    radius = own.kthvalue(min(neighbours + 1, len(manifold)), dim=1).values  # the first neighbour is the point itself
    return (torch.cdist(points, manifold) <= radius).any(1).double().mean().item()
