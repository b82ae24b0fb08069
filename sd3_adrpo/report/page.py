"""Sources to one HTML text. Nothing in it is fetched, and its content security policy forbids that too."""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from . import charts, tables
from .pictures import gallery
from .sources import Source

SORTABLE = {"reward": "reward", "accuracy": "accuracy", "clip_diversity": "CLIP diversity"}  # metrics of a prompt


def render(sources: Sequence[Source], images: int | None = None) -> str:
    """The page; `images` is the most of a prompt's images to show, None as many as keep it under 5 MB."""
    sources = list(sources)
    folder = files(__package__)
    script, style = (folder.joinpath(name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(folder.joinpath("page.html").read_text(encoding="utf-8"))
    shown = gallery(sources, most=images)
    return template.render(
        sources=sources,
        policy=_policy(script),
        script=Markup(script),  # our own files; everything else is escaped
        style=Markup(style),
        data={"runs": [{"name": s.name, "trained": s.trained} for s in sources], **shown},
        lead=_lead(sources),
        sortable=[(name, text) for name, text in SORTABLE.items() if any(name in s.metrics for s in sources)],
        rows=tables.headline(sources),
        distances=tables.distances(sources),
        references=_references(sources),
        categories=[(source, tables.categories(source)) for source in sources],
        curves=charts.curves(sources) + charts.by_sigma(sources),
        diversity=charts.reward_diversity(sources),
        facts=[(source, _facts(source)) for source in sources],
        made=time.strftime("%Y-%m-%d %H:%M"),
    )


def _policy(script: str) -> str:
    """Runs this one script, shows inlined images, and lets nothing leave: a prompt could not, even unescaped."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    )


def _lead(sources: list[Source]) -> dict[str, Any]:
    """What the top of the page says was measured."""
    sets = [source.samples for source in sources if source.samples]
    sizes = dict.fromkeys(f"{len(one['prompts'])} prompts × {one['images_per_prompt']} images" for one in sets)
    return {
        "title": " and ".join(s.name for s in sources) if len(sources) < 3 else f"{len(sources)} runs",
        "models": ", ".join(dict.fromkeys(str(source.summary["model"]) for source in sources)),
        "sizes": " and ".join(sizes),
        "trained": any(source.trained for source in sources),
    }


def _references(sources: list[Source]) -> str:
    """What the sets of images were compared with, and on which features."""
    found = [source.summary["distances"] for source in sources if source.summary.get("distances")]
    return " or ".join(dict.fromkeys(f"{one['reference']}, on features of {one['features']}" for one in found))


def _facts(source: Source) -> list[tuple[str, str]]:
    """Configuration and provenance in a few lines; the whole of config.yaml stands below them."""
    summary = source.summary
    prompts = summary.get("test_prompts") or summary.get("prompts") or {}
    facts = {
        "folder": source.folder.resolve().name,
        "model": summary.get("model"),
        "LoRA": summary.get("lora"),
        "objective": summary.get("objective"),
        "reward": summary.get("reward"),
        "seed": summary.get("seed"),
        "epochs": summary.get("epochs"),
        "training images": summary.get("images"),
        "time": summary.get("seconds") and f"{summary['seconds']:.0f} s",
        "measured on": prompts and f"{prompts.get('prompts')} prompts, {prompts.get('part')} of {prompts.get('file')}",
        "their sha256": prompts.get("sha256"),
        "versions": ", ".join(f"{name} {value}" for name, value in (summary.get("versions") or {}).items()),
        "settings": ", ".join(f"{name} {value}" for name, value in (summary.get("settings") or {}).items()),
    }
    return [(name, str(value)) for name, value in facts.items() if value not in (None, "", {})]
