"""Options that stand for a dataclass: `--objective NAME`, `--reward NAME` or NAME=WEIGHT,..., `--watch` alike."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import pkgutil
from collections.abc import Iterable
from typing import Any, get_type_hints

from . import objectives, rewards
from .config import Config
from .errors import OptionError, UserError
from .rewards._mixed import MixedReward, NoReward, is_mixed, parse_weights

KINDS = {"objective": objectives, "reward": rewards, "watch": rewards}  # options that pick a dataclass by name

Layer = dict[str, Any]  # dotted option names to values


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


def choose(kind: str, layers: list[tuple[str, Layer]], argv: list[str]) -> dict[str, type]:
    """The dataclasses, by section, that the strongest layer names. Options that weaker layers give to others go."""
    name, owners = getattr(Config(), kind).name, []
    for _, layer in layers:
        name = layer.get(f"{kind}.name", name)
        owners.append(name)
    name = (given(argv, f"{kind}.name") or [name])[-1]
    names = names_of(kind, name)
    allowed = [*available(kind), *(["none"] if kind == "watch" else [])]
    for one in names:
        if one not in allowed:
            where = "".join(f" (from {where})" for where, layer in layers if layer.get(f"{kind}.name") == name)
            known = KINDS[kind].__name__.rpartition(".")[2].removesuffix("s")
            raise OptionError(f"unknown {known} {one!r}{where}; available: {', '.join(allowed)}{nearest(one, allowed)}")
    for (_, layer), owner in zip(layers, owners, strict=True):
        if owner != name:
            hand_over(kind, layer, owner, name)
    if not is_mixed(name) or KINDS[kind] is not rewards:
        return {kind: NoReward if name == "none" else dataclass_of(kind, name)}
    return {kind: MixedReward, **{f"{kind}.{one}": dataclass_of(kind, one) for one in names}}


def names_of(kind: str, name: str) -> list[str]:
    """The files that a choice names: several of `clip=1.0,ocr=0.5`."""
    if KINDS[kind] is not rewards or not is_mixed(name):
        return [name]
    try:
        return list(parse_weights(name))
    except UserError as error:
        raise OptionError(str(error)) from None


def hand_over(kind: str, layer: Layer, owner: str, name: str) -> None:
    """Keeps the options in `layer`, given to `owner`, that also belong to `name`, under the names they have there."""
    names, mixed = names_of(kind, name), is_mixed(name)
    for key in [key for key in layer if key.startswith(f"{kind}.")]:
        value, option = layer.pop(key), key.removeprefix(f"{kind}.")
        part, dot, rest = option.partition(".")
        if not is_mixed(owner):
            part, dot, rest = owner, ".", option
        if part in names and dot and rest != "name":
            layer[f"{kind}.{part}.{rest}" if mixed else f"{kind}.{rest}"] = value
        elif not dot and mixed and part != "name":  # an option of the mix itself
            layer[key] = value


def dataclass_of(kind: str, name: str) -> type:
    module = importlib.import_module(f"{KINDS[kind].__name__}.{name}")
    for cls in vars(module).values():
        if dataclasses.is_dataclass(cls) and cls.__module__ == module.__name__ and getattr(cls, "name", None) == name:
            return cls
    raise TypeError(f'{module.__file__} has no dataclass with the field `name: Literal["{name}"] = "{name}"`')


def sections() -> dict[str, type]:
    """The dataclasses within Config by field name, but for those that are picked by name."""
    hints = get_type_hints(Config).items()
    return {name: hint for name, hint in hints if dataclasses.is_dataclass(hint) and name not in KINDS}


def given(argv: list[str], name: str) -> list[str]:
    """Values that the command line gives to an option, in order: `--name value` or `--name=value`."""
    values = []
    for position, word in enumerate(argv):
        option, equals, value = word.partition("=")
        if option == f"--{name}":
            values += [value] if equals else argv[position + 1 : position + 2]
    return values
