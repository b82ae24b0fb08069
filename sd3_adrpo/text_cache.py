"""Prompt embeddings on disk: the text encoders (T5 alone is 9.5 GB) load only for prompts never seen before.

One safetensors file per prompt, named after everything that the embedding depends on. Embeddings come back bit for bit.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .types import Condition

ENCODER_PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")


def default_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sd3_adrpo" / "text"


def fingerprint(folder: Path) -> str:
    """Of a model's text encoders and tokenizers, by the names, sizes and times of their files.

    In the hub's cache a file is a link to one named after its contents, which then stands for the time.
    """
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(file for part in ENCODER_PARTS for file in (folder / part).glob("*")):
        status = file.stat()
        version = file.resolve().name if file.is_symlink() else status.st_mtime_ns
        digest.update(repr((file.relative_to(folder).as_posix(), status.st_size, version)).encode())
    return digest.hexdigest()


class TextCache:
    """`identity` names the encoders, their dtype and the number of T5 tokens; others never meet its files."""

    def __init__(self, folder: Path, *identity: object) -> None:
        self.folder, self.identity = folder, identity

    def encode(self, prompts: Sequence[str], encoder: Callable[[Sequence[str]], Condition]) -> Condition:
        """A row per prompt; `encoder` is called once, with the prompts that are not on disk, or not at all."""
        unique = list(dict.fromkeys(prompts))
        rows = {prompt: self._read(prompt) for prompt in unique}
        missing = [prompt for prompt in unique if rows[prompt] is None]
        if missing:
            fresh = encoder(missing)
            for number, prompt in enumerate(missing):
                rows[prompt] = fresh.select(torch.tensor([number]))
                self._write(prompt, rows[prompt])
        chosen = [rows[prompt] for prompt in prompts]
        embeds, pooled = (torch.cat([getattr(row, name) for row in chosen]) for name in ("embeds", "pooled"))
        return Condition(embeds, pooled, chosen[0].repeats)

    def _path(self, prompt: str) -> Path:
        name = hashlib.blake2b(repr((*self.identity, prompt)).encode(), digest_size=20).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def _read(self, prompt: str) -> Condition | None:
        try:
            stored = load_file(self._path(prompt))
            return Condition(stored["embeds"], stored["pooled"], int(stored["repeats"]))
        except (OSError, SafetensorError, KeyError):  # not there, or cut short: encoded anew
            return None

    def _write(self, prompt: str, row: Condition) -> None:
        path = self._path(prompt)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        repeats = torch.tensor(row.repeats)
        save_file({"embeds": row.embeds.contiguous(), "pooled": row.pooled.contiguous(), "repeats": repeats}, temporary)
        os.replace(temporary, path)  # other runs see the whole file or none
