"""What leaves a run: its LoRA, checked by loading it, and a model card. `python -m sd3_adrpo.export` shares it.

The names below are imported when first asked for, so that --help need not wait for diffusers.
"""

from importlib import import_module

_HOMES = {
    "lora": "WEIGHTS TOLERANCE ExportError check_lora lora_factors read_lora save_lora stock_pipeline verify_lora",
    "card": "METRICS model_card",
    "comfyui": "save_comfyui to_comfyui",
    "merge": "merge_lora",
    "transformer": "save_transformer verify_transformer",
    "hub": "push_lora",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
