"""The one training loop of pretraining: AdamW, warm-up and cosine, moving average of the weights, progress, resume."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

Loss = Callable[[int, torch.Generator], Tensor]


def fit(
    name: str,
    module: nn.Module,
    loss: Loss,
    *,
    steps: int,
    learning_rate: float,
    work_dir: Path,
    seed: int,
    ema_decay: float = 0.998,
    warmup: int = 100,
    save_every: int = 200,
    muon: bool = False,
) -> None:
    """Trains the parameters of `module` that require gradients, and leaves their moving average in it.

    `loss(step, generator)` draws its own data; the generator depends on seed and step alone, so an interrupted run
    continues as if it had not been. The state lies in `work_dir/name.pt` and is written atomically.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizers = _optimizers(module, learning_rate, muon)
    average = [p.detach().clone() for p in parameters]
    path, first = work_dir / f"{name}.pt", 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        first = state["step"]
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        with torch.no_grad():
            for target, saved in zip(parameters + average, state["weights"] + state["average"], strict=True):
                target.copy_(saved)

    bar = tqdm(range(first, steps), desc=name, initial=first, total=steps, mininterval=5, dynamic_ncols=True)
    smooth = None
    for step in bar:
        rate = learning_rate * min(1.0, (step + 1) / warmup) * _cosine(step / steps)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = rate
        value = loss(step, torch.Generator().manual_seed(seed * 1_000_003 + step))
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(ema_decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
        if step % 10 == 0:
            smooth = value.item() if smooth is None else 0.9 * smooth + 0.1 * value.item()
            bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        if (step + 1) % save_every == 0 or step + 1 == steps:
            _save(path, step + 1, optimizers, parameters, average)
    with torch.no_grad():
        for parameter, mean in zip(parameters, average, strict=True):
            parameter.copy_(mean)


def _cosine(progress: float) -> float:
    return 0.02 + 0.98 * (0.5 + 0.5 * float(torch.cos(torch.tensor(torch.pi * progress))))


def _optimizers(module: nn.Module, learning_rate: float, muon: bool) -> list[torch.optim.Optimizer]:
    """AdamW; or Muon (K. Jordan, 2024, scaled as in arXiv 2502.16982) for hidden matrices and AdamW for the rest."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    outer = ("embed", "proj_out", "projection")  # first and last layers are not rotations of a hidden space
    hidden = [p for name, p in named if muon and p.dim() == 2 and not any(word in name for word in outer)]
    chosen = {id(p) for p in hidden}
    rest = [p for _, p in named if id(p) not in chosen]
    optimizers = [torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)]
    if hidden:
        optimizers.append(torch.optim.Muon(hidden, lr=learning_rate, adjust_lr_fn="match_rms_adamw", weight_decay=0.01))
    return optimizers


def _save(path: Path, step: int, optimizers: list, weights: list, average: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "step": step,
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "weights": [p.detach() for p in weights],
        "average": average,
    }
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)
