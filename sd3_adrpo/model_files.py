"""What a model's files say about it, without loading a weight: parts, parameters, layers. Only headers are read."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache

from . import shapes
from .errors import UserError

HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I8": 1, "U8": 1, "F8_E4M3": 1, "F8_E5M2": 1}


class Incomplete(UserError):
    """A model of which a part is missing."""


@dataclass
class ModelFiles:
    """`folder` is None for a hub model that is not in the local cache: of those only the published are known."""

    name: str
    folder: Path | None = None
    parameters: dict[str, int | None] = field(default_factory=dict)  # by part; None: weights not in safetensors
    stored_bytes: int = 0
    layers: dict[str, tuple[int, int]] = field(default_factory=dict)  # transformer's 2-D weights: name to (out, in)
    config: dict = field(default_factory=dict)  # transformer's
    vae_config: dict = field(default_factory=dict)
    clip_tokens: int = 77

    def text_tokens(self, max_sequence_length: int) -> int:
        """Tokens that the transformer sees; without a T5 that says something, one stands for all of its tokens."""
        silent = self.name == "shapes" or "text_encoder_3" not in self.parameters
        return self.clip_tokens + (1 if silent else max_sequence_length)

    def lora_parameters(self, targets: list[str], rank: int) -> int:
        """Weights of a LoRA on the layers whose names end in a target. UserError where a target matches none."""
        total = 0
        for target in targets:
            matched = [size for name, size in self.layers.items() if f".{name}".endswith(f".{target}")]
            if self.layers and not matched:
                ends = sorted({re.sub(r"^.*?\d+\.", "", name) for name in self.layers})
                raise UserError(
                    f"lora.target_modules: no layer of {self.name} ends in {target!r}; there are {', '.join(ends)}"
                )
            total += sum(rank * (rows + columns) for rows, columns in matched)
        return total


def inspect_model(model: str) -> ModelFiles:
    """`model` is "shapes", a local folder or a hub id. UserError where it is missing, incomplete or no SD3."""
    folder = _folder(model)
    try:
        return _published(model) if folder is None else _inspect(model, folder)
    except Incomplete:
        if model == "shapes" or Path(model).expanduser().exists() or constants.HF_HUB_OFFLINE:
            raise
        return _published(model)  # a download that was cut short: it goes on where it stopped


def _inspect(model: str, folder: Path) -> ModelFiles:
    index = _json(folder / "model_index.json")
    if index.get("_class_name") != "StableDiffusion3Pipeline":
        raise UserError(
            f"{model} holds a {index.get('_class_name')}; only StableDiffusion3Pipeline (SD3, SD3.5) can be trained"
        )
    tokenizer = folder / "tokenizer" / "tokenizer_config.json"
    clip_tokens = _json(tokenizer).get("model_max_length", 77) if tokenizer.is_file() else 77
    found = ModelFiles(model, folder, clip_tokens=clip_tokens)
    for part, kind in index.items():
        if not isinstance(kind, list) or kind[0] is None or part.startswith(("tokenizer", "scheduler", "_")):
            continue
        if not (folder / part).is_dir():
            raise Incomplete(
                f"{model} is incomplete: its model_index.json names {part}, which is not in {folder}. Download it again"
            )
        tensors = {name: entry for file in _weight_files(folder / part) for name, entry in _header(file).items()}
        if part == "transformer":
            found.config = _json(folder / part / "config.json")
            found.layers = _layers({name: tuple(entry["shape"]) for name, entry in tensors.items()})
        if part == "vae":
            found.vae_config = _json(folder / part / "config.json")
        sizes = [math.prod(entry["shape"]) for entry in tensors.values()]
        found.parameters[part] = sum(sizes) if tensors else None
        found.stored_bytes += sum(
            size * ITEM_BYTES.get(entry["dtype"], 4) for size, entry in zip(sizes, tensors.values(), strict=True)
        )
    return found


def _layers(shapes_of: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    weights = {name.removesuffix(".weight"): shape for name, shape in shapes_of.items() if name.endswith(".weight")}
    return {name: shape for name, shape in weights.items() if len(shape) == 2}


def _published(model: str) -> ModelFiles:
    """What is known of a model that is not here: all about the published ones."""
    from .models import published  # late: torch and diffusers

    config = published.TRANSFORMERS.get(model)
    if config is None:
        return ModelFiles(model)
    tensors = published.transformer_shapes(config)
    parameters = {"transformer": sum(map(math.prod, tensors.values())), **published.OTHER_PARTS}
    return ModelFiles(
        model,
        parameters=parameters,
        stored_bytes=2 * sum(parameters.values()),
        layers=_layers(tensors),
        config=config,
        vae_config=published.VAE,
    )


def _folder(model: str) -> Path | None:
    if model == "shapes":
        if not (shapes.PIPELINE_DIR / "model_index.json").is_file():
            raise UserError(
                f"the built-in model's weights are not in {shapes.PIPELINE_DIR}: get them with the repository, or make "
                "them with `python -m sd3_adrpo.shapes.pretrain`"
            )
        return shapes.PIPELINE_DIR
    path = Path(model).expanduser()
    if path.exists():
        if not (path / "model_index.json").is_file():
            raise UserError(f"{model} has no model_index.json: give the folder of a pipeline in diffusers' format")
        return path
    if not HUB_ID.match(model) or model.startswith("."):
        raise UserError(f'{model} is no folder here: give "shapes", a local folder, or a hub id such as owner/name')
    return _cached(model)


def _cached(model: str) -> Path | None:
    """Folder of a hub model in the local cache, or None when it has yet to be downloaded. Asks no network."""
    index = try_to_load_from_cache(model, "model_index.json")
    if isinstance(index, str):
        return Path(index).parent
    if constants.HF_HUB_OFFLINE:
        raise UserError(
            f"{model} is neither a folder here nor in the local cache, and HF_HUB_OFFLINE forbids to download it: "
            f"unset that, or run `hf download {model} --local-dir FOLDER` elsewhere and give that folder as the model"
        )
    return None


def _weight_files(folder: Path) -> list[Path]:
    """The part's safetensors, without the half-precision variant where the full one lies beside it."""
    files = sorted(folder.glob("*.safetensors"))
    return [file for file in files if ".fp16" not in file.name] or files


def _header(file: Path) -> dict[str, dict]:
    """Tensor name to {dtype, shape, data_offsets}. UserError where the file is shorter than they say."""
    length = file.stat().st_size
    try:
        with open(file, "rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size)) if size < length else None
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, AttributeError, KeyError, TypeError):
        raise UserError(f"{file} is damaged: its header cannot be read. Download it again") from None
    if length < 8 + size + end:
        raise UserError(f"{file} is truncated: {length} bytes of {8 + size + end}. Download it again")
    return header


def _json(file: Path) -> dict:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Incomplete(f"{file} is missing: download the model again") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
