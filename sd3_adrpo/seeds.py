"""Randomness by name: every draw of a run has a seed computed from what it is for.

No generator carries state from one draw to the next, so a resumed run, another batch size or another number of
processes draws the same numbers.
"""

from __future__ import annotations

import hashlib

import torch


def seed_for(*names: int | str) -> int:
    """A 63-bit seed from any names, e.g. `seed_for(run_seed, "rollout", epoch, sample)`."""
    digest = hashlib.blake2b(repr(names).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator_for(*names: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(seed_for(*names))


def epoch_prompts(total: int, per_epoch: int, epoch: int, seed: int) -> list[int]:
    """Indices of an epoch's prompts: shuffled passes over all, one after the other, so each comes up equally often."""
    first = epoch * per_epoch
    passes: dict[int, list[int]] = {}
    chosen = []
    for position in range(first, first + per_epoch):
        number, offset = divmod(position, total)
        if number not in passes:
            passes[number] = torch.randperm(total, generator=generator_for(seed, "prompts", number)).tolist()
        chosen.append(passes[number][offset])
    return chosen
