"""The command line and YAML files to a `Config`; what is misspelt or ill-typed stops here, before anything heavy loads.

Later wins: defaults of config.py < preset of the model, or the options of the run that --resume_from_checkpoint means <
each --config in turn < the command line. `--objective NAME` stands for `--objective.name NAME` and picks the dataclass
in objectives/NAME.py; `--reward` likewise, or several with `--reward clip=1.0,ocr=0.5`, whose options are
`--reward.clip.model` and so on. `--watch` takes what `--reward` takes.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

import jsonargparse
import yaml

from . import rewards
from .choices import KINDS, Layer, available, choose, nearest, sections
from .config import Config
from .errors import OptionError
from .option_help import first_line, option_help
from .option_layers import layers_of, preset_for, presets

__all__ = ["available", "dump", "nearest", "parse", "preset_for", "presets"]

METAVARS = {int: "N", float: "X", str: "TEXT", str | None: "TEXT", float | None: "X"}
CONFIG_HELP = "YAML file of options, or a preset's name; may be repeated"

USAGE = "python train_sd3.py [--model MODEL] [--prompts FILE] [--config FILE] [--OPTION VALUE ...]"
DESCRIPTION = "Fine-tunes SD3 or SD3.5 with a reward. The defaults shown are those of the model and files given."


class WideHelp(jsonargparse.DefaultHelpFormatter):
    """One line per option."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=46, width=160)


def parse(argv: Sequence[str] | None = None, program: str = "train_sd3.py") -> Config:
    """The resolved Config. On what it does not know it prints to stderr, as `program`, and exits with 2; exits with 0
    after --help."""
    shorts = "|".join(KINDS)
    argv = [re.sub(rf"^--({shorts})(=|$)", r"--\1.name\2", word) for word in (sys.argv[1:] if argv is None else argv)]
    try:
        return _resolve(argv)
    except OptionError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _resolve(argv: list[str]) -> Config:
    """`parse`, with long names. OptionError."""
    layers = layers_of(argv)
    chosen = {section: cls for kind in KINDS for section, cls in choose(kind, layers, argv).items()}
    parser, types = _parser(chosen)
    _refuse_unknown(argv, types)
    for where, layer in layers:
        for key in layer:
            if key not in types:
                raise OptionError(f"{where}: unknown option {key!r}{nearest(key, types)}")
        checked = _validate(lambda layer=layer: parser.parse_object(_nest(layer)), types, where)
        parser.set_defaults({key: checked[key] for key in layer})
    values = _validate(lambda: parser.parse_args(argv), types, "command line").as_dict()
    values.pop("config")
    try:
        return Config(**{**values, **_build({**sections(), **chosen}, values)})
    except ValueError as error:
        raise OptionError(str(error)) from None


def dump(config: Config) -> str:
    """YAML of every option; `--config` of it gives an equal Config."""
    values = dataclasses.asdict(config)
    for kind in KINDS:
        for name, part in values[kind].pop("parts", {}).items():
            values[kind][name] = {option: value for option, value in part.items() if option != "name"}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


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


def _parser(chosen: dict[str, type]) -> tuple[jsonargparse.ArgumentParser, dict[str, Any]]:
    """The parser, and the type of each dotted option."""
    parser = jsonargparse.ArgumentParser(
        prog="train_sd3.py", usage=USAGE, description=DESCRIPTION, formatter_class=WideHelp, exit_on_error=False
    )
    parser.add_argument("--config", type=str, metavar="FILE", help=CONFIG_HELP)
    types: dict[str, Any] = {}
    for section, cls in [("", Config), *chosen.items(), *sections().items()]:
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


def _refuse_unknown(argv: list[str], types: dict[str, Any]) -> None:
    known = [*types, *KINDS, "config", "help"]
    for word in argv:
        name = word.partition("=")[0].removesuffix("+")
        if name.startswith("--") and name[2:] not in known:
            raise OptionError(f"unknown option {name}{nearest(name[2:], known, '--')} (--help lists them all)")


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
            raise OptionError(f"{where}: {message}") from None
        key, value = found.groups()
        hint = types[key]
        choices = get_args(hint) if get_origin(hint) is Literal else ()
        allowed = f"one of {', '.join(choices)}" if choices else hint.__name__ if isinstance(hint, type) else hint
        allowed = "a list, such as '[attn.to_q, attn.to_v]'" if get_origin(hint) is list else allowed
        raise OptionError(f"{where}: {key} is {value!r}; it must be {allowed}{nearest(value, choices)}") from None


def _nest(layer: Layer) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in layer.items():
        *sections, name = key.split(".")
        inner = nested
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    return nested
