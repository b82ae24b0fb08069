"""The model card beside an exported LoRA: what it was trained on and with, what was measured, how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

PLACE = "FOLDER_OF_THIS_FILE"  # in the card's example
METRICS = {  # key in summary.json: what a reader sees
    "reward": "reward",
    "accuracy": "accuracy (all of the prompt drawn)",
    "free_diversity": "diversity among right images, drawn = 1",
    "clip_diversity": "CLIP diversity (also falls when wrong images vanish)",
    "w2_drift": "drift, mean square of v - v_ref",
}


def model_card(
    summary: Mapping, *, base_model: str, reward: str, prompts: str, sampling: Mapping | None = None, t5: bool = True
) -> str:
    """Text of README.md beside the weights.

    `summary` is summary.json's content, `reward` names its encoder and unit, `prompts` the file trained on, `sampling`
    the pipeline's arguments that reproduce the measured setting, `t5` whether the base comes with a T5 encoder.
    """
    on_hub = base_model.count("/") == 1 and not base_model.startswith((".", "~", "/")) and not Path(base_model).exists()
    header = ["library_name: diffusers", "tags: [lora, text-to-image, stable-diffusion-3, adrpo]"]
    header += [f"base_model: {base_model}"] if on_hub else []
    built_in = base_model == "shapes"
    imports = ["from sd3_adrpo.shapes import PIPELINE_DIR"] if built_in else []
    arguments = ["PIPELINE_DIR" if built_in else f'"{base_model}"']
    arguments += [] if t5 else ["text_encoder_3=None", "tokenizer_3=None"]
    call = ", ".join(['"a prompt"', *(f"{key}={value!r}" for key, value in (sampling or {}).items())])
    rows = [
        f"| {title} | {_number(summary['before'].get(key))} | {_number(summary['after'].get(key))} "
        f"| {_difference(summary['difference'].get(key))} |"
        for key, title in METRICS.items()
    ]
    lines = ["---", *header, "---", "", f"# LoRA for {base_model}", ""]
    lines += [f"- {title}: {value}" for title, value in _facts(summary, base_model, reward, prompts)]
    lines += ["", "Measured on the test prompts, the same noise under base and LoRA (± one standard error):", ""]
    lines += ["| | before | after | difference |", "|---|---|---|---|", *rows, "", "```python"]
    lines += ["from diffusers import StableDiffusion3Pipeline", *imports]
    lines += [f"pipeline = StableDiffusion3Pipeline.from_pretrained({', '.join(arguments)})"]
    lines += [f'pipeline.load_lora_weights("{PLACE}")', f"image = pipeline({call}).images[0]"]
    return "\n".join([*lines, 'image.save("image.png")', "```", ""])


def _facts(summary: Mapping, base_model: str, reward: str, prompts: str) -> list[tuple[str, object]]:
    facts = [("Base model", base_model), ("Objective", summary.get("objective")), ("Reward", reward)]
    facts += [("Training prompts", prompts), ("Test prompts", summary.get("test_prompts"))]
    facts += [(key.capitalize(), summary.get(key)) for key in ("seed", "epochs", "images")]
    return [(title, value) for title, value in facts if value is not None]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _difference(value: Mapping | None) -> str:
    return "-" if not value or value.get("mean") is None else f"{value['mean']:+.4g} ± {_number(value.get('stderr'))}"
