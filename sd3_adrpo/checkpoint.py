"""Checkpoints: written whole or not at all, checked when read."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from .errors import UserError

STATE = "state.pt"


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Writes `folder/state.pt` beside the old one and renames: a crash leaves the old checkpoint or the new one."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    with open(temporary / f"{STATE}.partial", "wb") as file:  # not to be found before it is whole
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary / f"{STATE}.partial", temporary / STATE)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state in a checkpoint folder. UserError where it is missing or damaged."""
    file = path / STATE
    if not file.is_file():
        raise UserError(f"{path} is no checkpoint: it holds no {STATE}. Give a folder like RUN/checkpoints/epoch-0003")
    try:
        return torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:  # truncated zip, wrong pickle, i/o: all mean the same to the user
        raise UserError(f"{file} cannot be read ({error}). Resume from an older checkpoint beside it") from error


def find_checkpoint(path: str, output_dir: str | None) -> Path:
    """The checkpoint folder that `--resume_from_checkpoint` means: one itself, a run's newest, or "latest"."""
    root = Path(path)
    if path == "latest":
        runs = Path(output_dir) if output_dir else None
        candidates = [runs] if runs else sorted(Path("runs").glob("*/"), key=lambda run: run.stat().st_mtime)
        candidates = [run for run in candidates if any(run.glob(f"checkpoints/*/{STATE}"))]
        if not candidates:
            raise UserError(
                f"nothing to resume: no run with checkpoints in {runs or 'runs/'}. Start without that option"
            )
        root = candidates[-1]
    if (root / STATE).is_file():
        return root
    found = sorted(root.glob(f"checkpoints/*/{STATE}"), key=_age) or sorted(root.glob(f"*/{STATE}"), key=_age)
    if not found:
        raise UserError(
            f"resume_from_checkpoint is {path!r}: no checkpoint there. Give a run folder, a checkpoint or 'latest'"
        )
    return found[-1].parent


def prune(folder: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints of a run."""
    for old in sorted(folder.glob(f"epoch-*/{STATE}"), key=_age)[:-keep]:
        shutil.rmtree(old.parent, ignore_errors=True)


def _age(state: Path) -> tuple[int, str]:
    """By when it was written: who went back to epoch 20 goes on from the 24 that came after it, not from the old 30."""
    return state.stat().st_mtime_ns, str(state)
