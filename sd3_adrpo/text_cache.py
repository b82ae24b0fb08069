"""Prompt embeddings on disk: the text encoders (T5 alone is 9.5 GB) load only for prompts never seen before.

One safetensors file per prompt, named after everything that the embedding depends on. Embeddings come back bit for bit,
when a batch asks for them: SD3.5's are 1.7 MB each, so those of 25,000 prompts would fill 42 GB of every process.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from .errors import UserError
from .types import Condition

ENCODER_PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
AT_A_TIME = 32  # prompts encoded, then written: who is stopped goes on from there


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


class Rows:
    """A tensor (N, T, D) whose rows stay on disk until they are indexed."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Tensor) -> Tensor:
        """(B, T, D) for the row numbers (B,)."""
        unique, place = index.unique(return_inverse=True)
        return torch.cat([self._read(self.files[number]) for number in unique.tolist()])[place]

    def to(self, *args, **kwargs) -> Tensor:
        """All of them, as a tensor."""
        return self[torch.arange(len(self))].to(*args, **kwargs)

    def _read(self, file: Path) -> Tensor:
        try:
            return load_file(file)["embeds"]
        except (OSError, SafetensorError, KeyError) as error:
            raise UserError(
                f"the prompt embedding {file} cannot be read any more ({error}), and the text encoders have left: "
                "start again, a run with --resume_from_checkpoint; the prompt is then encoded anew"
            ) from error


class TextCache:
    """`identity` names the encoders, their dtype and the number of T5 tokens; others never meet its files."""

    def __init__(self, folder: Path, *identity: object) -> None:
        self.folder, self.identity = folder, identity

    def encode(self, prompts: Sequence[str], encoder: Callable[[Sequence[str]], Condition]) -> Condition:
        """A row per prompt, read when it is selected; `encoder` is called with the prompts that are not on disk."""
        rows = {prompt: self._read(prompt) for prompt in prompts}
        missing = [prompt for prompt, row in rows.items() if row is None]
        starts = range(0, len(missing), AT_A_TIME)
        for start in tqdm(starts, "encoding prompts", unit_scale=AT_A_TIME, disable=len(starts) < 2):
            batch = missing[start : start + AT_A_TIME]
            fresh = encoder(batch)
            for number, prompt in enumerate(batch):
                self._write(prompt, fresh.select(torch.tensor([number])))
                rows[prompt] = self._read(prompt)
        pooled, repeats = zip(*(rows[prompt] for prompt in prompts), strict=True)
        return Condition(Rows([self._path(prompt) for prompt in prompts]), torch.cat(pooled), repeats[0])

    def _path(self, prompt: str) -> Path:
        name = hashlib.blake2b(repr((*self.identity, prompt)).encode(), digest_size=20).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def _read(self, prompt: str) -> tuple[Tensor, int] | None:
        """The pooled embedding (1, P) and `repeats`, which are small. None: not there, or cut short."""
        try:
            with safe_open(self._path(prompt), "pt") as stored:
                stored.get_slice("embeds")
                return stored.get_tensor("pooled").clone(), int(stored.get_tensor("repeats"))
        except (OSError, SafetensorError):
            return None

    def _write(self, prompt: str, row: Condition) -> None:
        path = self._path(prompt)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        repeats = torch.tensor(row.repeats)
        save_file({"embeds": row.embeds.contiguous(), "pooled": row.pooled.contiguous(), "repeats": repeats}, temporary)
        os.replace(temporary, path)  # other runs see the whole file or none
