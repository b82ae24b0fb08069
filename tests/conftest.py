"""Fixtures shared by all tests. Nothing here needs a network."""

from __future__ import annotations

import os

os.environ.setdefault(
    "HF_HUB_OFFLINE", "1"
)  # before the libraries read it: a test that reaches for the hub fails at once

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
from stand_in_gpu import gpu  # noqa: E402, F401


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The models are so small that threads only get into each other's way."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_sd35(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random pipeline with all of SD3.5-medium's parts: T5, dual attention, qk_norm."""
    return tiny.build(tmp_path_factory.mktemp("tiny_sd35"), t5=True, dual=True)


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random pipeline without text_encoder_3 and with SD3-medium's plain blocks."""
    return tiny.build(tmp_path_factory.mktemp("tiny_sd3"), t5=False, dual=False)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Prompt embeddings of the tests stay out of the user's cache."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
