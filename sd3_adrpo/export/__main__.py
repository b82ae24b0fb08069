"""Shares a run's LoRA: `python -m sd3_adrpo.export runs/... --comfyui FILE --merge FOLDER --push USER/NAME`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError, exit_code
from ..loading import find_lora, run_of

PROGRAM = "python -m sd3_adrpo.export"
DTYPES = ("float32", "bfloat16", "float16")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Exits with 2 on anything unknown, ill-typed or missing."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__, allow_abbrev=False)
    parser.add_argument("lora", metavar="RUN_OR_LORA_DIR", help="folder of a run or of its LoRA, or a weight file")
    parser.add_argument(
        "--comfyui", type=Path, metavar="FILE", help="convert for ComfyUI; a folder: a file named as the run, in it"
    )
    parser.add_argument("--merge", type=Path, metavar="FOLDER", help="write the base with the LoRA merged in")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of the merged transformer, float32: exact")
    parser.add_argument("--model", help="base of --merge; the run's own if not given")
    parser.add_argument(
        "--push", metavar="USER/NAME", help="upload LoRA, model card and --comfyui's file to the hub; asks nothing"
    )
    parser.add_argument("--private", action="store_true", help="a repository that --push makes is private")
    args = parser.parse_args(argv)
    if not (args.comfyui or args.merge or args.push):
        parser.error("nothing to do: give --comfyui FILE, --merge FOLDER or --push USER/NAME")
    return args


def base_of(args: argparse.Namespace) -> str:
    """The model to merge into: --model, else the run's own."""
    if args.model:
        return args.model
    run = run_of(args.lora)
    if run is None:
        raise UserError(f"{args.lora} lies in no run that names its base: say --model M")
    import yaml

    return yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["model"]


def run(args: argparse.Namespace) -> None:
    """Does what was asked for, cheapest first, and says what it wrote."""
    import torch

    from . import merge_lora, push_lora, save_comfyui

    lora, made = find_lora(args.lora), None
    if args.comfyui:
        name = (run_of(lora) or lora.with_suffix("")).name
        file = args.comfyui / f"{name}.safetensors" if args.comfyui.is_dir() else args.comfyui
        made = save_comfyui(lora, file)
        print(f"for ComfyUI's models/loras: {made}", flush=True)
    if args.merge:
        folder = merge_lora(lora, base_of(args), args.merge, getattr(torch, args.dtype))
        print(f'merged: StableDiffusion3Pipeline.from_pretrained("{folder}")', flush=True)
    if args.push:
        print(f"pushed: {push_lora(lora, args.push, args.private, made)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 an error the user can mend (one message, no traceback), 2 bad options."""
    args = parse(argv)
    return exit_code(PROGRAM, lambda: run(args), (UserError, OSError))  # a full disk, a network that is gone


if __name__ == "__main__":
    sys.exit(main())
