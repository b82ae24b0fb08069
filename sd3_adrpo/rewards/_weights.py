"""Published checkpoints: found, read without running code from them, and what is missing told with its remedy."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn


@contextmanager
def loading(option: str, source: str) -> Iterator[None]:
    """What the hub, the disk and the libraries raise within, as a UserError about `reward.OPTION`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each library has its own; all of them mean that this model cannot be had
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"reward.{option} {source} does not load: {reason}. It must be a folder here or a hub id; where the hub "
            f"cannot be reached, run `hf download {source} --local-dir FOLDER` elsewhere and give --reward.{option} "
            "FOLDER"
        ) from error


WEIGHT_FILES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")


def check_source(source: str, option: str) -> None:
    """UserError where `source` can only mean a file or folder here, and there is none. The hub is not asked."""
    local = source.startswith((".", "/", "~")) or source.endswith(WEIGHT_FILES) or source.count("/") > 1
    address = source.startswith(("http://", "https://"))
    if not source or (local and not address and not Path(source).expanduser().exists()):
        raise UserError(
            f"reward.{option} {source!r} is not there (looked from {Path.cwd()}); give a file or folder that is, or a "
            "hub id such as owner/name"
        )


def find_file(source: str, name: str, option: str) -> Path:
    """The file `name` of a folder or hub repository `source`; `source` may also be the file itself, or its URL.

    Raises UserError where it is in none of them.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / name).is_file():
            raise UserError(f"reward.{option} {source} has no {name}; give the file, or a folder that holds it")
        return path / name
    if source.startswith(("http://", "https://")):
        return _download(source, name, option)
    from huggingface_hub import hf_hub_download

    with loading(option, source):
        return Path(hf_hub_download(source, name))


def _download(url: str, name: str, option: str) -> Path:
    """Into torch's cache, where it stays."""
    import torch

    target = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(target), progress=False)
        except Exception as error:
            raise UserError(
                f"reward.{option} cannot be downloaded: {error}. Where that address can be reached, run "
                f"`curl -L -o {name} '{url}'`, bring the file here and give --reward.{option} {name}"
            ) from error
    return target


def read_state(file: Path) -> dict[str, Tensor]:
    """Tensors by name, in float32 on the CPU. Takes safetensors and torch files, the latter without pickled code;
    unwraps `state_dict` and the prefix of parallel training. UserError where the file is neither."""
    import torch
    from safetensors.torch import load_file

    try:
        safe = file.suffix == ".safetensors"
        state = load_file(file) if safe else torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{file} cannot be read as weights: {error}. Download it again") from error
    state = state.get("state_dict", state)
    tensors = {name.removeprefix("module."): value for name, value in state.items() if hasattr(value, "shape")}
    return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}


def load_strictly(module: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Every weight of `module` from `state`, and no other. UserError names what is missing, too much or misshapen."""
    try:
        missing, surplus = module.load_state_dict(state, strict=False)
    except RuntimeError as error:  # shapes
        raise UserError(f"{source} holds another architecture: {error}") from error
    if missing or surplus:
        listed = [f"{word} {', '.join(names[:3])}" for word, names in (("lacks", missing), ("has", surplus)) if names]
        raise UserError(f"{source} is another checkpoint than the published one: it {' and '.join(listed)}")


def linear_head(state: dict[str, Tensor], prefix: str, source: str | Path) -> nn.Sequential:
    """The stack of linear layers `PREFIX.N.weight`, `.bias`, in the order of N, ending in one number.

    The published heads (LAION's, V2.5's, ImageReward's) have dropout between them, nothing when evaluated, and no
    activation: the numbers N jump over the dropouts. UserError where the state has no such stack.
    """
    from torch import nn

    pattern = re.compile(rf"{re.escape(prefix)}\.(\d+)\.weight")
    numbers = sorted(int(found[1]) for found in map(pattern.fullmatch, state) if found)
    weights = [state[f"{prefix}.{number}.weight"] for number in numbers]
    fits = all(after.shape[1] == before.shape[0] for before, after in zip(weights, weights[1:], strict=False))
    if not weights or not fits or weights[-1].shape[0] != 1:
        raise UserError(f"{source} has no head {prefix}.N.weight that ends in one number; it has {list(state)[:3]}")
    head = nn.Sequential(*(nn.Linear(weight.shape[1], weight.shape[0]) for weight in weights))
    parts = [(new, old, part) for new, old in enumerate(numbers) for part in ("weight", "bias")]
    head.load_state_dict({f"{new}.{part}": state[f"{prefix}.{old}.{part}"] for new, old, part in parts})
    return head.eval().requires_grad_(False)
