"""The optimiser of the trained weights, and its states in 8 bits where memory for them is short."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .config import TrainConfig
from .errors import UserError


def make_optimizer(parameters: Iterable[torch.nn.Parameter], train: TrainConfig) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101) with moments of 4 bytes each, or of 1 byte and a scale per 256 (arXiv 2110.02861).

    UserError where torchao, which holds the 8-bit one, is missing or does not fit the installed torch.
    """
    options = {
        "lr": train.learning_rate,
        "betas": (train.adam_beta1, train.adam_beta2),
        "weight_decay": train.adam_weight_decay,
        "eps": train.adam_epsilon,
    }
    if train.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **options)
    try:
        from torchao.optim import AdamW8bit  # late: it takes seconds
    except ImportError as error:
        raise UserError(
            f"train.optimizer adamw_8bit needs torchao, which does not import here ({error}): "
            "pip install -e '.[lowbit]', or take adamw"
        ) from error
    return AdamW8bit(parameters, **options)
