"""Pictures from prompts, with the base or a LoRA: `python -m sd3_adrpo.sample "a red circle" --lora runs/... --strip`.

Without options it draws with the built-in model. Options not given are those of the run that the LoRA lies in, if it
does, else of the model's preset. The n-th picture's noise is that of the seed `--seed` + n, whatever the prompt, weight
or number of pictures.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import cli
from .config import Config
from .errors import UserError, exit_code
from .loading import present_lora, run_of
from .prompts import PROMPTS_DIR, Prompt, read_prompts

if TYPE_CHECKING:
    from torch import Tensor

    from .models.sd3 import SD3

PROGRAM = "python -m sd3_adrpo.sample"
WEIGHTS = (0.0, 1.5)  # allowed strengths of a LoRA: none, and half as much again as was trained
STRIP = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
OPTIONS = {  # ours -> the option of a training run that it sets
    "model": ("model", "M", '"shapes" (built in), a hub id or a local folder'),
    "config": ("config", "FILE", "YAML file of a run, or a preset's name"),
    "num_inference_steps": ("eval.num_inference_steps", "N", "steps of the ODE solver"),
    "guidance_scale": ("eval.guidance_scale", "X", "1 is none"),
    "height": ("rollout.height", "N", "pixels"),
    "width": ("rollout.width", "N", "pixels"),
}


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, Config]:
    """Exits with 2 on anything unknown, ill-typed or out of range."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__, allow_abbrev=False)
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="none: four of the built-in test prompts")
    parser.add_argument("--lora", metavar="DIR", help="folder of a run or of its LoRA, or a file; none: the base")
    parser.add_argument("--weight", type=_weight, metavar="W", help="strength of the LoRA, 0 to 1.5; default 1")
    parser.add_argument("--strip", action="store_true", help="a row per picture over the weights 0, 0.25 ... 1.5")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the first picture's noise; default 0")
    parser.add_argument("--number", type=_positive, metavar="N", help="pictures of a prompt; default 4, in a strip 1")
    parser.add_argument("--output", type=Path, metavar="FILE", help="a PNG; default: a new dated one under runs/")
    for name, (_, metavar, text) in OPTIONS.items():
        parser.add_argument(f"--{name}", metavar=metavar, help=text)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        names = [*OPTIONS, "lora", "weight", "strip", "seed", "number", "output"]
        parser.error(f"unknown option {unknown[0]}{cli.nearest(unknown[0].lstrip('-'), names, '--')}")
    if args.lora is None and (args.strip or args.weight is not None):
        parser.error("--weight and --strip are of a LoRA: give --lora DIR too")
    if args.strip and args.weight is not None:
        parser.error(f"--strip shows the weights {', '.join(f'{w:g}' for w in STRIP)}: leave out --weight")
    if args.output and args.output.suffix.lower() != ".png":
        parser.error(f"--output {args.output} must end in .png")
    given = {target: getattr(args, name) for name, (target, _, _) in OPTIONS.items() if getattr(args, name) is not None}
    if args.lora and "config" not in given and (run := run_of(args.lora)):
        given["config"] = str(run / "config.yaml")
    args.number = args.number or (1 if args.strip else 4)
    return args, cli.parse([f"--{name}={value}" for name, value in given.items()], PROGRAM)


def _weight(text: str) -> float:
    low, high = WEIGHTS
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
    return value


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no positive number of pictures")
    return int(text)


def choose_prompts(texts: Sequence[str], config: Config) -> list[Prompt]:
    """The given ones; without any, four of the built-in test set at even steps."""
    if any(not text.strip() for text in texts):
        raise UserError("a prompt is empty; write what the picture should show")
    if texts:
        return [Prompt(text) for text in texts]
    if config.model != "shapes":
        raise UserError(f'{config.model} needs a prompt: python -m sd3_adrpo.sample "a red circle" ...')
    known = read_prompts(PROMPTS_DIR / "shapes_test.csv")
    return [known[i * len(known) // 4] for i in range(4)]


def draw(
    model: SD3, prompts: Sequence[Prompt], config: Config, seeds: Sequence[int], weights: Sequence[float | None]
) -> Tensor:
    """Images (prompts, seeds, weights, 3, H, W), uint8; a seed's noise is one for all. None is the model as it is.

    The text encoders are dropped on the way.
    """
    import torch
    from tqdm import tqdm

    from .evaluation import encode_prompts
    from .loading import ADAPTER
    from .rewards.clip import quantise
    from .rollout import sample

    rollout, evaluation = config.rollout, config.eval
    condition, negative = encode_prompts(model, prompts, evaluation.guidance_scale)
    model.drop_text_encoders()
    shape = model.latent_shape(rollout.height, rollout.width)
    sigmas = model.sigmas(evaluation.num_inference_steps, rollout.shift, rollout.height, rollout.width)
    index = torch.arange(len(prompts)).repeat_interleave(len(seeds))
    options = {"guidance_scale": evaluation.guidance_scale, "negative": negative, "batch_size": evaluation.batch_size}
    columns = []
    with tqdm(total=len(index) * len(weights), unit="img", dynamic_ncols=True) as bar:
        for weight in weights:
            if weight is not None:
                model.pipeline.set_adapters(ADAPTER, weight)
            noise_seeds = list(seeds) * len(prompts)
            clean = sample(model, condition, index, noise_seeds, sigmas, shape, progress=bar.update, **options)
            columns.append(quantise(model.decode(clean)).cpu())
    return torch.stack(columns, dim=1).unflatten(0, (len(prompts), len(seeds)))


def save(images: Tensor, prompts: Sequence[Prompt], seeds: Sequence[int], args: argparse.Namespace) -> Path:
    """One sheet: a column per seed, or in a strip per weight. Larger images are also saved each, in full, beside it."""
    from torchvision.transforms.functional import to_pil_image

    from . import figures

    path = args.output or Path("runs") / time.strftime("%Y-%m-%d_%H-%M-%S_sample.png")
    texts = [prompt.text for prompt in prompts]
    if args.strip:
        rows = [f"{text}  (seed {seed})" for text in texts for seed in seeds]
        figures.grid(images.flatten(0, 2), len(STRIP), path, rows, [f"weight {weight:g}" for weight in STRIP])
    else:
        rows = [text + (f"  (LoRA, weight {args.weight:g})" if args.weight not in (None, 1) else "") for text in texts]
        figures.grid(images.flatten(0, 2), len(seeds), path, rows, [f"seed {seed}" for seed in seeds])
    if max(images.shape[-2:]) > figures.CELL[1]:  # the sheet has it reduced
        folder = path.with_suffix("")
        folder.mkdir(parents=True, exist_ok=True)
        for row, of_prompt in enumerate(images):
            for seed, of_seed in zip(seeds, of_prompt, strict=True):
                for column, image in enumerate(of_seed):
                    weight = f"_weight{STRIP[column]:g}" if args.strip else ""
                    to_pil_image(image).save(folder / f"{row + 1:02d}_seed{seed}{weight}.png")
    return path


def run(args: argparse.Namespace, config: Config) -> Path:
    """Draws and saves; returns the sheet's path."""
    prompts = choose_prompts(args.prompts, config)
    if args.output and args.output.exists():
        raise UserError(f"--output {args.output} exists already: give another name, or move it away")
    if args.lora:
        present_lora(args.lora)
    print(f"loading {config.model}", flush=True)
    from .loading import load_lora, load_model  # here and not above: they load for seconds

    model = load_model(config)
    if args.lora:
        print(f"with {load_lora(model, args.lora)}", flush=True)
    seeds = range(args.seed, args.seed + args.number)
    weights = STRIP if args.strip else [args.weight]
    images = draw(model, prompts, config, seeds, weights)
    path = save(images, prompts, seeds, args)
    print(f"look at {path}")
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 an error the user can mend (one message, no traceback), 2 bad options."""
    args, config = parse(argv)
    return exit_code(PROGRAM, lambda: run(args, config))


if __name__ == "__main__":
    sys.exit(main())
