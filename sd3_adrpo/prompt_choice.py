"""Which prompts a run trains on and which it is measured on: files of the user's, or those of the built-in world."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from . import prompts as prompt_files
from .config import Config
from .errors import UserError
from .prompts import Prompt, file_hash, held_out, read_prompts


def resolve_prompts(config: Config) -> tuple[list[Prompt], list[Prompt], dict[str, Any]]:
    """(train, test, description of both). A file that is not in the working folder is looked for in prompts/.

    What is held out is drawn by `eval.seed`, not by `seed`: runs of several seeds are measured on the same prompts.
    """
    pairs = getattr(config.objective, "pairs_file", None)
    if pairs and config.prompts:
        raise UserError(f"the prompts come from objective.pairs_file {pairs}: leave out --prompts {config.prompts}")
    builtin = config.model == "shapes" and config.prompts is None
    if pairs:
        return _resolve_pairs(Path(pairs), config, builtin)
    if config.prompts is None and not builtin:
        raise UserError(f"{config.model} needs --prompts FILE (prompts/README.md lists what comes with the program)")
    path = find_prompts("shapes_rl.csv" if builtin else config.prompts)
    train = read_prompts(path)
    if config.test_prompts or builtin:
        test_path, source = find_prompts(config.test_prompts or "shapes_test.csv"), "all"
        test = read_prompts(test_path)
    else:
        (train, test), test_path = held_out(train, config.eval.seed), path
        source = "held out" if len(test) < len(train) else "all"  # under ten prompts are both
    described = {
        "train": {"file": _shown(path), "part": "the rest" if source == "held out" else "all"},
        "test": {"file": _shown(test_path), "part": source},
    }
    for part, prompts, file in (("train", train, path), ("test", test, test_path)):
        categories = Counter(prompt.category for prompt in prompts if prompt.category)
        described[part] |= {"sha256": file_hash(file), "prompts": len(prompts)}
        described[part]["categories"] = dict(categories)
    described["test"]["also_trained_on"] = len({prompt.text for prompt in train} & {prompt.text for prompt in test})
    return train, test, described


def _resolve_pairs(path: Path, config: Config, builtin: bool) -> tuple[list[Prompt], list[Prompt], dict[str, Any]]:
    from .pairs import as_prompts, read_pairs  # late: loads torch

    train = as_prompts(read_pairs(path))
    if config.test_prompts is None and not builtin:
        raise UserError("objective.pairs_file needs --test_prompts FILE: what shall the policy be measured on?")
    test_path = find_prompts(config.test_prompts or "shapes_test.csv")
    test = read_prompts(test_path)
    described = {"train": {"file": _shown(path), "part": "all"}, "test": {"file": _shown(test_path), "part": "all"}}
    for part, prompts, file in (("train", train, path), ("test", test, test_path)):
        described[part] |= {"sha256": file_hash(file), "prompts": len(prompts), "categories": {}}
    described["test"]["also_trained_on"] = len({prompt.text for prompt in train} & {prompt.text for prompt in test})
    return train, test, described


def _shown(path: Path) -> str:
    """Short for a shipped file, so that a run's summary does not name the folder of somebody's computer."""
    shipped = path.resolve().is_relative_to(prompt_files.PROMPTS_DIR.resolve())
    return f"prompts/{path.name}" if shipped else str(path)


def find_prompts(name: str) -> Path:
    """A prompt file by its path, else by its name in prompts/. Whether it exists is not asked."""
    path = Path(name).expanduser()
    shipped = prompt_files.PROMPTS_DIR / name
    return shipped if not path.exists() and shipped.is_file() else path
