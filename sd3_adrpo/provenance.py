"""Which versions made a result. Written beside every summary, because a seed alone repeats nothing."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = "sd3_adrpo torch torchvision diffusers transformers peft accelerate open_clip_torch".split()


def versions() -> dict[str, str]:
    """Python and the packages that numbers depend on, as installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed as a package"
    return found
