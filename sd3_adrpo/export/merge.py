"""The LoRA merged into its base: a pipeline's folder that any version of diffusers loads, without peft."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from torch import nn

from ..errors import UserError
from ..loading import find_lora, run_of
from ..model_files import inspect_model
from .lora import check_lora, follow_umask, read_lora

CARD = """# {model} with a LoRA merged in

The transformer is that of {model} with the LoRA {lora} added at strength 1, stored in {dtype};
every other part is a copy.

```python
from diffusers import StableDiffusion3Pipeline

pipeline = StableDiffusion3Pipeline.from_pretrained("FOLDER_OF_THIS_FILE")
```
"""


@torch.no_grad()
def merge_lora(lora: str | Path, model: str, folder: str | Path, dtype: torch.dtype = torch.float32) -> Path:
    """Writes `folder`, whole or not at all: the base's files, and a transformer with W + B A in every LoRA layer.

    The sum is taken in float32 and stored in `dtype`; in 16 bits a part of a small change rounds away. `model` is
    "shapes", a local folder or a hub id that is in the local cache. The text encoders and the VAE are not loaded.
    ExportError for a LoRA of another model, UserError for a missing model or a folder in use.
    """
    folder = Path(folder).expanduser()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder: give another, or move it away")
    base = inspect_model(model).folder
    if base is None:
        raise UserError(f"{model} is not in the local cache: run `hf download {model}` first, or give a local folder")
    transformer = SD3Transformer2DModel.from_pretrained(base / "transformer", torch_dtype=torch.float32)
    check_lora(lora, transformer)
    for name, (down, up) in read_lora(lora).items():
        weight = transformer.get_submodule(name).weight
        weight += (up.float().flatten(1) @ down.float().flatten(1)).view_as(weight)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as partial:
        made = Path(partial) / "pipeline"
        shutil.copytree(base, made, ignore=_not_of_the_pipeline(base), copy_function=shutil.copyfile)
        nn.Module.to(transformer, dtype)  # diffusers' own `to` warns of an empty list
        transformer.save_pretrained(made / "transformer")
        for file in (made / "transformer").glob("*.safetensors"):
            follow_umask(file)
        name = (run_of(lora) or find_lora(lora)).name
        text = CARD.format(model=model, lora=name, dtype=str(dtype).removeprefix("torch."))
        (made / "README.md").write_text(text, encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        made.replace(folder)
    return folder


def _not_of_the_pipeline(base: Path) -> Callable[[str, list[str]], set[str]]:
    """For copytree: leaves out the base's transformer, and what a repository holds beside the pipeline's parts."""
    index = json.loads((base / "model_index.json").read_text(encoding="utf-8"))
    kept = {"model_index.json", *(name for name in index if name != "transformer")}

    def ignored(folder: str, names: list[str]) -> set[str]:
        licences = {name for name in names if name.lower().startswith("license")}
        return set(names) - kept - licences if Path(folder) == base else set()

    return ignored
