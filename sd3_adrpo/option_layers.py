"""Where options come from: the model's preset, then every --config, the weakest first; the command line beats all.

A run that goes on starts from its own options instead of a preset's.

A layer maps dotted option names to values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonargparse

from . import rewards
from .checkpoint import find_checkpoint
from .choices import KINDS, Layer, available, given, hand_over, names_of, nearest, sections
from .config import Config
from .errors import OptionError, UserError

PRESETS_DIR = Path(__file__).parent / "presets"


def presets() -> list[str]:
    return sorted(path.stem for path in PRESETS_DIR.glob("*.yaml"))


def preset_for(model: str) -> str:
    """Name of the preset that a model starts from."""
    if model == "shapes":
        return "shapes"
    return "sd3.5-medium" if "3.5" in model else "sd3-medium"


def layers_of(argv: list[str]) -> list[tuple[str, Layer]]:
    """(where it is from, options) of the preset or the run that goes on, and of each --config, the weakest first."""
    files = given(argv, "config")
    layers = [_read(file) for file in files]
    if own := _options_of_run(argv):
        files, layers = [own, *files], [_read(own), *layers]
    elif not any(file in presets() and "model" in layer for file, (_, layer) in zip(files, layers, strict=True)):
        models = [layer["model"] for _, layer in layers if "model" in layer] + given(argv, "model")
        files = [preset_for(str(models[-1] if models else Config.model)), *files]
        layers.insert(0, _read(files[0]))
    return _tuned(_watched(layers, files, argv), argv)


def _options_of_run(argv: list[str]) -> str | None:
    """config.yaml of the run that --resume_from_checkpoint means; None without one."""
    folders = given(argv, "output_dir")
    for path in given(argv, "resume_from_checkpoint")[-1:]:
        try:
            file = find_checkpoint(path, folders[-1] if folders else None).parent.parent / "config.yaml"
        except UserError:  # said by the plan, with all else that is wrong
            return None
        return str(file) if file.is_file() else None
    return None


def _watched(layers: list[tuple[str, Layer]], files: list[str], argv: list[str]) -> list[tuple[str, Layer]]:
    """What a preset says of its reward holds where that one is watched too: `--watch clip` is the CLIP of the model."""
    names = [layer["watch.name"] for _, layer in layers if "watch.name" in layer]
    name = str((given(argv, "watch.name") or names or [Config().watch.name])[-1])
    result = []
    for (where, layer), file in zip(layers, files, strict=True):
        owner = layer.get("reward.name")
        if file in presets() and owner in names_of("watch", name):
            options = {key.replace("reward", "watch", 1): value for key, value in layer.items()}
            own = {key: value for key, value in options.items() if key.startswith("watch.")}
            own["watch.name"] = owner
            hand_over("watch", own, owner, name)
            result.append((f"{where}, reward", {"watch.name": name, **own}))
        result.append((where, layer))
    return result


def _tuned(layers: list[tuple[str, Layer]], argv: list[str]) -> list[tuple[str, Layer]]:
    """What a file says under `objectives: NAME:` follows it as a layer of its own, if that objective is chosen."""
    names = [layer["objective.name"] for _, layer in layers if "objective.name" in layer]
    name = (given(argv, "objective.name") or names or [Config().objective.name])[-1]
    result = []
    for where, layer in layers:
        tuned = {key: layer.pop(key) or {} for key in list(layer) if key.startswith("objectives.")}
        result.append((where, layer))
        if own := tuned.get(f"objectives.{name}"):
            result.append((f"{where}, objectives.{name}", {"objective.name": name, **own}))
    return result


def _read(file: str) -> tuple[str, Layer]:
    path = PRESETS_DIR / f"{file}.yaml" if file in presets() else Path(file).expanduser()
    try:
        content = jsonargparse.get_loader("yaml")(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = f"{', '.join(presets())}{nearest(file, presets())}"
        raise OptionError(f"--config {file}: no such file, and the presets are {known}") from None
    except Exception as error:  # i/o, encoding, YAML syntax
        raise OptionError(f"--config {file} cannot be read: {error}") from error
    if not isinstance(content or {}, dict):
        kind = type(content).__name__
        raise OptionError(f"{path}: holds a {kind}; it must map options to values, such as `epochs: 10`")
    layer: Layer = {}
    for key, value in (content or {}).items():
        section = key in KINDS or key in sections()
        if isinstance(value, dict) or (section and value is None):
            layer |= _section(key, value or {})
        elif key in KINDS:
            layer[f"{key}.name"] = value
        elif section:
            raise OptionError(f"{path}: {key} is {value!r}; it must map options to values, such as `{key}: {{...}}`")
        else:
            layer[str(key)] = value
    return str(path), layer


def _section(key: str, values: dict[str, Any]) -> Layer:
    """Dotted options of one section. Of a reward also `{clip: 1.0, ocr: 0.5}` and, by name, the options of each."""
    if KINDS.get(key) is rewards and values and all(isinstance(value, int | float) for value in values.values()):
        if values.keys() <= set(available(key)):
            return {f"{key}.name": ",".join(f"{name}={weight}" for name, weight in values.items())}
    layer: Layer = {}
    for name, value in values.items():
        inner = value if isinstance(value, dict) and key in KINDS else {"": value}
        layer |= {".".join(filter(None, (key, name, option))): entry for option, entry in inner.items()}
    return layer
