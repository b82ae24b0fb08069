"""The command line and YAML files to a `Config`; what is misspelt or ill-typed stops here, before anything heavy loads.

Later wins: defaults of config.py < preset of the model < each --config in turn < the command line. `--objective NAME`
stands for `--objective.name NAME` and picks the dataclass in objectives/NAME.py; `--reward` likewise, or several with
`--reward clip=1.0,ocr=0.5`, whose options are `--reward.clip.model` and so on. `--watch` takes what `--reward` takes.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import jsonargparse
import yaml

from . import objectives, rewards
from .config import Config
from .errors import UserError
from .option_help import first_line, option_help
from .rewards._mixed import MixedReward, NoReward, is_mixed, parse_weights

PRESETS_DIR = Path(__file__).parent / "presets"
KINDS = {"objective": objectives, "reward": rewards, "watch": rewards}  # options that pick a dataclass by name
METAVARS = {int: "N", float: "X", str: "TEXT", str | None: "TEXT", float | None: "X"}
CONFIG_HELP = "YAML file of options, or a preset's name; may be repeated"

USAGE = "python train_sd3.py [--model MODEL] [--prompts FILE] [--config FILE] [--OPTION VALUE ...]"
DESCRIPTION = "Fine-tunes SD3 or SD3.5 with a reward. The defaults shown are those of the model and files given."

Layer = dict[str, Any]  # dotted option names to values


class WideHelp(jsonargparse.DefaultHelpFormatter):
    """One line per option."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=46, width=160)


def parse(argv: Sequence[str] | None = None) -> Config:
    """The resolved Config. Prints to stderr and exits with 2 on what it does not know; exits with 0 after --help."""
    shorts = "|".join(KINDS)
    argv = [re.sub(rf"^--({shorts})(=|$)", r"--\1.name\2", word) for word in (sys.argv[1:] if argv is None else argv)]
    layers = _layers(argv)
    chosen = {section: cls for kind in KINDS for section, cls in _choose(kind, layers, argv).items()}
    parser, types = _parser(chosen)
    _refuse_unknown(argv, types)
    for where, layer in layers:
        for key in layer:
            if key not in types:
                _fail(f"{where}: unknown option {key!r}{nearest(key, types)}")
        checked = _validate(lambda layer=layer: parser.parse_object(_nest(layer)), types, where)
        parser.set_defaults({key: checked[key] for key in layer})
    values = _validate(lambda: parser.parse_args(argv), types, "command line").as_dict()
    values.pop("config")
    try:
        return Config(**{**values, **_build({**_sections(), **chosen}, values)})
    except ValueError as error:
        _fail(str(error))


def dump(config: Config) -> str:
    """YAML of every option; `--config` of it gives an equal Config."""
    values = dataclasses.asdict(config)
    for kind in KINDS:
        for name, part in values[kind].pop("parts", {}).items():
            values[kind][name] = {option: value for option, value in part.items() if option != "name"}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def presets() -> list[str]:
    return sorted(path.stem for path in PRESETS_DIR.glob("*.yaml"))


def preset_for(model: str) -> str:
    """Name of the preset that a model starts from."""
    if model == "shapes":
        return "shapes"
    return "sd3.5-medium" if "3.5" in model else "sd3-medium"


def available(kind: str) -> list[str]:
    """Names of the objectives or rewards: the files of their folder."""
    return sorted(module.name for module in pkgutil.iter_modules(KINDS[kind].__path__) if module.name[0] != "_")


def nearest(name: str, options: Iterable[str], dashes: str = "") -> str:
    """`; did you mean X?` with the options that share the last part of `name`, else are close to it; else empty."""
    options, name = list(options), str(name).replace("-", "_")
    last = {option: option.rpartition(".")[2] for option in options}
    found = [option for option in options if last[option] == name.rpartition(".")[2]]
    found = found or difflib.get_close_matches(name, options, n=1, cutoff=0.75)
    if not found:
        close = difflib.get_close_matches(name.rpartition(".")[2], last.values(), n=1, cutoff=0.6)
        found = [option for option in options if last[option] in close]
    return f"; did you mean {' or '.join(dashes + option for option in found)}?" if found else ""


def _layers(argv: list[str]) -> list[tuple[str, Layer]]:
    """(where it is from, options) of the preset and of each --config, the weakest first."""
    files = _given(argv, "config")
    layers = [_read(file) for file in files]
    if not set(files) & set(presets()):
        models = [layer["model"] for _, layer in layers if "model" in layer] + _given(argv, "model")
        files = [preset_for(str(models[-1] if models else Config.model)), *files]
        layers.insert(0, _read(files[0]))
    return _tuned(_watched(layers, files, argv), argv)


def _watched(layers: list[tuple[str, Layer]], files: list[str], argv: list[str]) -> list[tuple[str, Layer]]:
    """What a preset says of its reward holds where that one is watched too: `--watch clip` is the CLIP of the model."""
    names = [layer["watch.name"] for _, layer in layers if "watch.name" in layer]
    name = str((_given(argv, "watch.name") or names or [Config().watch.name])[-1])
    result = []
    for (where, layer), file in zip(layers, files, strict=True):
        owner = layer.get("reward.name")
        if file in presets() and owner in _names("watch", name):
            options = {key.replace("reward", "watch", 1): value for key, value in layer.items()}
            own = {key: value for key, value in options.items() if key.startswith("watch.")}
            own["watch.name"] = owner
            _hand_over("watch", own, owner, name)
            result.append((f"{where}, reward", {"watch.name": name, **own}))
        result.append((where, layer))
    return result


def _tuned(layers: list[tuple[str, Layer]], argv: list[str]) -> list[tuple[str, Layer]]:
    """What a file says under `objectives: NAME:` follows it as a layer of its own, if that objective is chosen."""
    names = [layer["objective.name"] for _, layer in layers if "objective.name" in layer]
    name = (_given(argv, "objective.name") or names or [Config().objective.name])[-1]
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
        _fail(f"--config {file}: no such file, and the presets are {', '.join(presets())}{nearest(file, presets())}")
    except Exception as error:  # i/o, encoding, YAML syntax
        _fail(f"--config {file} cannot be read: {error}")
    if not isinstance(content or {}, dict):
        _fail(f"{path}: holds a {type(content).__name__}; it must map options to values, such as `epochs: 10`")
    layer: Layer = {}
    for key, value in (content or {}).items():
        section = key in KINDS or key in _sections()
        if isinstance(value, dict) or (section and value is None):
            layer |= _section(key, value or {})
        elif key in KINDS:
            layer[f"{key}.name"] = value
        elif section:
            _fail(f"{path}: {key} is {value!r}; it must map options to values, such as `{key}: {{...}}`")
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


def _choose(kind: str, layers: list[tuple[str, Layer]], argv: list[str]) -> dict[str, type]:
    """The dataclasses, by section, that the strongest layer names. Options that weaker layers give to others go."""
    name, owners = getattr(Config(), kind).name, []
    for _, layer in layers:
        name = layer.get(f"{kind}.name", name)
        owners.append(name)
    name = (_given(argv, f"{kind}.name") or [name])[-1]
    names = _names(kind, name)
    allowed = [*available(kind), *(["none"] if kind == "watch" else [])]
    for one in names:
        if one not in allowed:
            where = "".join(f" (from {where})" for where, layer in layers if layer.get(f"{kind}.name") == name)
            known = KINDS[kind].__name__.rpartition(".")[2].removesuffix("s")
            _fail(f"unknown {known} {one!r}{where}; available: {', '.join(allowed)}{nearest(one, allowed)}")
    for (_, layer), owner in zip(layers, owners, strict=True):
        if owner != name:
            _hand_over(kind, layer, owner, name)
    if not is_mixed(name) or KINDS[kind] is not rewards:
        return {kind: NoReward if name == "none" else _dataclass(kind, name)}
    return {kind: MixedReward, **{f"{kind}.{one}": _dataclass(kind, one) for one in names}}


def _names(kind: str, name: str) -> list[str]:
    """The files that a choice names: several of `clip=1.0,ocr=0.5`."""
    if KINDS[kind] is not rewards or not is_mixed(name):
        return [name]
    try:
        return list(parse_weights(name))
    except UserError as error:
        _fail(str(error))


def _hand_over(kind: str, layer: Layer, owner: str, name: str) -> None:
    """Keeps the options in `layer`, given to `owner`, that also belong to `name`, under the names they have there."""
    names, mixed = _names(kind, name), is_mixed(name)
    for key in [key for key in layer if key.startswith(f"{kind}.")]:
        value, option = layer.pop(key), key.removeprefix(f"{kind}.")
        part, dot, rest = option.partition(".")
        if not is_mixed(owner):
            part, dot, rest = owner, ".", option
        if part in names and dot and rest != "name":
            layer[f"{kind}.{part}.{rest}" if mixed else f"{kind}.{rest}"] = value
        elif not dot and mixed and part != "name":  # an option of the mix itself
            layer[key] = value


def _dataclass(kind: str, name: str) -> type:
    module = importlib.import_module(f"{KINDS[kind].__name__}.{name}")
    for cls in vars(module).values():
        if dataclasses.is_dataclass(cls) and cls.__module__ == module.__name__ and getattr(cls, "name", None) == name:
            return cls
    raise TypeError(f'{module.__file__} has no dataclass with the field `name: Literal["{name}"] = "{name}"`')


def _build(classes: dict[str, type], values: dict[str, Any]) -> dict[str, Any]:
    """The dataclasses of the top-level sections, from the parsed options."""
    built = {}
    for section, cls in classes.items():
        if "." not in section:
            prefix = f"{section}."
            parts = {name.removeprefix(prefix): part for name, part in classes.items() if name.startswith(prefix)}
            own = {name: value for name, value in values[section].items() if name not in parts}
            if parts:
                own["parts"] = {name: part(**values[section].get(name, {})) for name, part in parts.items()}
            built[section] = cls(**own)
    return built


def _sections() -> dict[str, type]:
    """The dataclasses within Config by field name, but for those that are picked by name."""
    hints = get_type_hints(Config).items()
    return {name: hint for name, hint in hints if dataclasses.is_dataclass(hint) and name not in KINDS}


def _parser(chosen: dict[str, type]) -> tuple[jsonargparse.ArgumentParser, dict[str, Any]]:
    """The parser, and the type of each dotted option."""
    parser = jsonargparse.ArgumentParser(
        prog="train_sd3.py", usage=USAGE, description=DESCRIPTION, formatter_class=WideHelp, exit_on_error=False
    )
    parser.add_argument("--config", type=str, metavar="FILE", help=CONFIG_HELP)
    types: dict[str, Any] = {}
    for section, cls in [("", Config), *chosen.items(), *_sections().items()]:
        group = parser.add_argument_group(section, first_line(cls) or None) if section else parser
        hints, comments = get_type_hints(cls), option_help(cls)
        for field in dataclasses.fields(cls):
            if field.name in KINDS or field.name == "parts" or dataclasses.is_dataclass(hints[field.name]):
                continue
            if "." in section and field.name == "name":  # said by the name of the mix
                continue
            key = f"{section}.{field.name}" if section else field.name
            types[key] = hints[field.name]
            factory = field.default_factory
            default = field.default if factory is dataclasses.MISSING else factory()
            text = comments.get(field.name) or field.name.replace("_", " ")
            if section in KINDS and field.name == "name":
                text = f"--{section} NAME for short, one of: {', '.join(available(section))}"
                text += "; or several, NAME=WEIGHT,NAME=WEIGHT" if KINDS[section] is rewards else ""
            more = {"nargs": "?", "const": True} if types[key] is bool else {}
            if types[key] in METAVARS:
                more["metavar"] = METAVARS[types[key]]
            group.add_argument(f"--{key}", type=types[key], default=default, help=text.replace("%", "%%"), **more)
    return parser, types


def _given(argv: list[str], name: str) -> list[str]:
    """Values that the command line gives to an option, in order: `--name value` or `--name=value`."""
    values = []
    for position, word in enumerate(argv):
        option, equals, value = word.partition("=")
        if option == f"--{name}":
            values += [value] if equals else argv[position + 1 : position + 2]
    return values


def _refuse_unknown(argv: list[str], types: dict[str, Any]) -> None:
    known = [*types, *KINDS, "config", "help"]
    for word in argv:
        name = word.partition("=")[0].removesuffix("+")
        if name.startswith("--") and name[2:] not in known:
            _fail(f"unknown option {name}{nearest(name[2:], known, '--')} (--help lists them all)")


def _validate(
    action: Callable[[], jsonargparse.Namespace], types: dict[str, Any], where: str
) -> jsonargparse.Namespace:
    """The action's result; jsonargparse's complaint becomes one line, with the nearest of the allowed values."""
    try:
        return action()
    except jsonargparse.ArgumentError as error:
        message = " ".join(str(error).split())
        found = re.search(r'key "(.*?)".* value: (.*)$', message)
        if not found or found[1] not in types:
            _fail(f"{where}: {message}")
        key, value = found.groups()
        hint = types[key]
        choices = get_args(hint) if get_origin(hint) is Literal else ()
        allowed = f"one of {', '.join(choices)}" if choices else hint.__name__ if isinstance(hint, type) else hint
        allowed = "a list, such as '[attn.to_q, attn.to_v]'" if get_origin(hint) is list else allowed
        _fail(f"{where}: {key} is {value!r}; it must be {allowed}{nearest(value, choices)}")


def _nest(layer: Layer) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in layer.items():
        *sections, name = key.split(".")
        inner = nested
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    return nested


def _fail(message: str) -> NoReturn:
    print(f"train_sd3.py: error: {message}", file=sys.stderr)
    raise SystemExit(2)
