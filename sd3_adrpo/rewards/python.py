"""Any Python function as a reward, from a module or a file of one's own: docs/rewards.md has one of 20 lines."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal

from ..errors import UserError
from ..prompts import Prompt
from ._images import quantise

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass
class PythonReward:
    """A function of your own: (images uint8 (B, 3, H, W), prompts) -> B numbers, the higher the better."""

    name: Literal["python"] = "python"
    function: str | None = None  # module:function or path/to/file.py:function

    def describe(self) -> str:
        """UserError where the option has not the form, or the file is not there or has no such name; the code itself is
        not run."""
        source, name = self._split()
        file = Path(source).expanduser()
        if source.endswith(".py") and not file.is_file():
            raise UserError(f"the python reward's file {source} is not there (looked from {Path.cwd()})")
        if source.endswith(".py"):
            text = file.read_text("utf-8", "replace")
            if name not in re.findall(r"\w+", text) and "import *" not in text:
                raise _no_function(source, name, re.findall(r"^def (\w+)", text, re.MULTILINE))
        return f"{name} of {source}"

    def _split(self) -> tuple[str, str]:
        source, colon, name = (self.function or "").rpartition(":")
        if not colon or not source or not name.isidentifier():
            raise UserError(
                f"the python reward's function is {self.function!r}; it must be module:function or "
                "path/to/file.py:function, such as --reward python --reward.function my_reward.py:score"
            )
        return source, name

    def load(self, device: str | torch.device = "cpu") -> PythonScorer:
        """Runs the module's or file's code. UserError where that fails or it has no such function."""
        self.describe()
        source, name = self._split()
        try:
            module = _from_file(Path(source).expanduser()) if source.endswith(".py") else _from_name(source)
        except Exception as error:  # whatever the user's code raises
            raise UserError(f"the python reward's {source} does not load: {type(error).__name__}: {error}") from error
        function = getattr(module, name, None)
        if not callable(function):
            names = [key for key, value in vars(module).items() if inspect.isfunction(value)]
            raise _no_function(source, name, names)
        return PythonScorer(function, str(self.function))


def _no_function(source: str, name: str, names: Sequence[str]) -> UserError:
    return UserError(f"{source} has no function {name!r}; it has {', '.join(names) or 'none'}")


def _from_name(name: str) -> ModuleType:
    if str(Path.cwd()) not in sys.path:  # as `python -m` does
        sys.path.insert(0, str(Path.cwd()))
    return importlib.import_module(name)


def _from_file(path: Path) -> ModuleType:
    """Under a name of its own, so that a file called clip.py hides no library; what lies beside it can be imported."""
    name = f"sd3_adrpo_reward_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(path.resolve().parent) not in sys.path:
        sys.path.append(str(path.resolve().parent))
    spec.loader.exec_module(module)
    return module


class PythonScorer:
    """Calls function(images, prompts): images uint8 (B, 3, H, W) on the CPU, prompts a list of B texts.

    A function with a parameter `metadata` also gets the prompts' records, a list of B dicts or None.
    """

    def __init__(self, function: Callable, encoder: str) -> None:
        self.function, self.encoder, self.unit = function, encoder, str(getattr(function, "unit", "own unit"))
        self.takes_metadata = "metadata" in inspect.signature(function).parameters

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Whatever the function returns, tensor, array or list, as float32 on the CPU."""
        import torch

        more = {"metadata": [prompt.metadata for prompt in prompts]} if self.takes_metadata else {}
        scores = self.function(quantise(images).cpu(), [prompt.text for prompt in prompts], **more)
        if isinstance(scores, list | tuple):
            scores = [float(score) for score in scores]  # also of tensors of one element
        return torch.as_tensor(scores).detach().to("cpu", torch.float32)
