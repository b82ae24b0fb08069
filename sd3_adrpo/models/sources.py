"""Where a model comes from, what its libraries raise and say on the way, and what that means to a user."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError

from ..errors import UserError

LOAD_ERRORS = (OSError, ValueError, ImportError, SafetensorError)
TRUNCATION_LOGGERS = (
    "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
    "transformers.tokenization_utils_base",
)


def source_of(model: str) -> str:
    """The folder or hub id to hand to diffusers."""
    if model == "shapes":
        from ..shapes import PIPELINE_DIR  # late: the built-in world is not needed for other models

        return str(PIPELINE_DIR)
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise UserError(f"{model} has no model_index.json: give the folder of a pipeline in diffusers' format")
        return str(path)
    if path.is_file():
        raise UserError(f"{model} is a file: give the folder of a pipeline in diffusers' format, or a hub id")
    if model.count("/") != 1 or model.startswith((".", "/", "~")) or model.endswith("/"):
        raise UserError(f'{model} is no folder here: give "shapes", a local folder, or a hub id such as owner/name')
    return model


def explain(model: str, error: BaseException) -> str:
    """What went wrong and what to do, from the whole chain of causes: diffusers rewords the hub's own errors."""
    chain, link = [], error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__

    def caused_by(*kinds: type) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    page = f"https://huggingface.co/{model}"
    if caused_by(GatedRepoError):
        return f"{model} is gated: accept its licence at {page}, then log in with `hf auth login`"
    if caused_by(RepositoryNotFoundError):
        return f"{model} is not on the hub, or private: check the name at {page}, or log in with `hf auth login`"
    if caused_by(LocalEntryNotFoundError, ConnectionError):
        return (
            f"{model} is not in the local cache and the hub cannot be reached: connect (and unset HF_HUB_OFFLINE), "
            f"or run `hf download {model} --local-dir FOLDER` elsewhere and give that folder as the model"
        )
    if caused_by(EntryNotFoundError):
        return f"{model} has no model_index.json: it is not a pipeline in diffusers' format"
    return f"{model} does not load, a part of it may be missing or damaged: {error}"


@contextmanager
def quiet_about_cut_prompts() -> Iterator[None]:
    """diffusers and transformers write one message per cut prompt and encoder; ours is one for all."""
    loggers = [logging.getLogger(name) for name in TRUNCATION_LOGGERS]
    levels = [each.level for each in loggers]
    try:
        for each in loggers:
            each.setLevel(logging.ERROR)
        yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
