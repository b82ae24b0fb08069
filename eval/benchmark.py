"""Speed and memory as ratios measured in one run: `python eval/benchmark.py`; on a GPU also `--shape sd3.5-medium`.

Writes benchmark.json and prints a table. Options of train_sd3.py may follow, e.g. `--rollout.merge_lora false`.

    rollout_vs_bare    latent rollouts (text cached, nothing decoded) / as many bare calls of the frozen transformer
    rollout_vs_stock   prompt to image: StableDiffusion3Pipeline.__call__ / ours, at equal steps, guidance and batch
    train_vs_serial    a loop over single noise levels with stock text tokens / our updates, same draws, same loss
    epoch_vs_parts     a whole epoch / the sum of its transformer, decoder and reward calls
    overlap_gain       sampling with a reward that waits as long as a batch takes: one after the other / side by side

Each is a ratio of median seconds; those compared take turns. Built-in world: the bare calls have our own 41 tokens, one
of which stands for 256 zeros of an absent T5; the stock pipeline's have all 296 (models/repeated_token.py). On a CPU
seconds are the processor's, so other programs do not count.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # the program of this folder, installed or not

import torch  # noqa: E402
from benchmark_parts import Rollouts, Training, epoch, phases  # noqa: E402
from benchmark_running import flat_memory, waiting_reward  # noqa: E402
from benchmark_setup import SHAPES, Setup, setup  # noqa: E402
from timing import Clock, matrix_peak  # noqa: E402

from sd3_adrpo.errors import UserError  # noqa: E402

RESULT = "benchmark.json"
SIZES = {  # of rollouts, training and an epoch
    "shapes": "--rollout.prompts_per_epoch 4 --rollout.samples_per_prompt 8 --train.batch_size 16 "
    "--objective.refresh_epochs 0",  # the serial loop has a frozen reference
    "sd3.5-medium": "--rollout.prompts_per_epoch 48 --rollout.samples_per_prompt 8",
    "tiny": "--rollout.prompts_per_epoch 2 --rollout.samples_per_prompt 4 --train.batch_size 4",
}


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="benchmark.py", description=__doc__, formatter_class=formatter)
    parser.add_argument("--output_dir", type=Path, help="none: a new dated folder under runs/")
    parser.add_argument("--shape", choices=SHAPES, default="shapes", help="built-in world, or random weights")
    parser.add_argument("--batch_size", type=int, default=32, help="images of a rollout, a multiple of 4")
    parser.add_argument("--num_inference_steps", type=int, default=12, help="of a rollout")
    parser.add_argument("--repeats", type=int, default=5, help="of everything; medians count")
    parser.add_argument("--memory", type=int, metavar="EPOCHS", help="only: memory after each of so many epochs")
    args, options = parser.parse_known_args(argv)
    if args.batch_size < 4 or args.batch_size % 4:
        parser.error(f"--batch_size is {args.batch_size}; it must be a multiple of the 4 prompts")
    if args.repeats < 1:
        parser.error(f"--repeats is {args.repeats}; it must be at least 1")
    return args, options


def main(argv: Sequence[str] | None = None) -> int:
    args, options = parse(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        made = setup(args.shape, [*SIZES[args.shape].split(), "--rollout.num_inference_steps", "10", *options], device)
    except UserError as error:
        print(f"benchmark.py: error: {error}", file=sys.stderr)
        return 1
    if args.memory:
        return flat_memory(made, args.memory)
    clock = Clock(device)
    result = {"shape": args.shape, **_where(device), "settings": vars(args) | {"options": options}}
    result["settings"]["output_dir"] = None  # the folder of somebody's computer is no result
    result |= rollouts(made, clock, args)
    result |= training(made, clock, args.repeats)
    made.stock = None  # its weights are not the epoch's memory
    result["overlap_gain"] = waiting_reward(made, args.repeats)
    result["epoch"] = epoch(made, clock, args.repeats)
    result["epoch_vs_parts"] = result["epoch"].pop("epoch_vs_parts")
    _print(result)
    folder = args.output_dir or Path(f"runs/{time.strftime('%Y-%m-%d_%H-%M-%S')}_benchmark")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULT).write_text(json.dumps(result, indent=2, default=str) + "\n")
    print(f"\nwrote {folder / RESULT}")
    return 0


def rollouts(made: Setup, clock: Clock, args: argparse.Namespace) -> dict[str, Any]:
    work = Rollouts(made, args.batch_size, args.num_inference_steps)
    actions = {
        "bare": work.bare,
        "latents": work.latents,
        "latents_unmerged": lambda: work.latents(merge=False),
        "images": work.images,
        "stock_images": work.stock_images,
    }
    seconds = clock.compare(actions, args.repeats)
    peak = matrix_peak(made.model.device, made.model.dtype, 8192 if clock.cuda else 1024, clock)
    return {
        "rollout_vs_bare": seconds["latents"] / seconds["bare"],
        "rollout_vs_stock": seconds["stock_images"] / seconds["images"],
        "merge_gain": seconds["latents_unmerged"] / seconds["latents"],
        "rollout_fraction_of_peak": work.flops() / seconds["latents"] / peak,
        "matrix_peak_flops": peak,
        "images_per_second": {name: args.batch_size / value for name, value in seconds.items()}
        | phases(made, work, clock, args.repeats),
    }


def training(made: Setup, clock: Clock, repeats: int) -> dict[str, Any]:
    work = Training(made)
    losses: dict[str, list[float]] = {}
    actions = {
        "ours": lambda: losses.update(ours=work.ours()),
        "serial": lambda: losses.update(serial=work.serial(written_out=True)),
    }
    folded = made.condition.repeats > 1
    if folded:
        actions["serial_folded"] = lambda: losses.update(serial_folded=work.serial(written_out=False))
    seconds = clock.compare(actions, repeats)
    difference = max(abs(a - b) for name in losses for a, b in zip(losses[name], losses["ours"], strict=True))
    peak = matrix_peak(made.model.device, made.model.dtype, 8192 if clock.cuda else 1024, clock)
    train = made.config.train
    draws = work.trainer.samples * train.sigmas_per_sample * train.inner_epochs
    return {
        "train_vs_serial": seconds["serial"] / seconds["ours"],
        "train_vs_serial_with_our_tokens": seconds["serial_folded" if folded else "serial"] / seconds["ours"],
        "train_loss_difference": difference,
        "train_fraction_of_peak": work.flops() / seconds["ours"] / peak,
        "draws_per_second": {name: draws / value for name, value in seconds.items()},
    }


def _where(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {"device": name, "torch": torch.__version__}


def _print(result: dict[str, Any]) -> None:
    print(f"\n{result['shape']} on {result['device']}, torch {result['torch']}\n")
    epoch_of = result["epoch"]
    for name, value in result.items():
        if isinstance(value, float):
            print(f"{name:36}{value:14.4g}")
    for group in ("images_per_second", "draws_per_second"):
        print(f"\n{group.replace('_', ' ')}")
        for name, value in result[group].items():
            print(f"  {name:34}{value:14.4g}")
    print(f"\nan epoch of {epoch_of['images']} images: {epoch_of['seconds']:.3g} s")
    for name, value in epoch_of["breakdown"].items():
        print(f"  {name:34}{value:12.3g} s{value / epoch_of['seconds']:8.1%}")
    for name, value in epoch_of["relative_seconds"].items():
        print(f"  {'x seconds, ' + name:64}{value:.3f}")
    for name, value in epoch_of["peak_memory_bytes"].items():
        print(f"  {'peak memory, ' + name:34}{value / 1e9:11.2f} GB")


if __name__ == "__main__":
    sys.exit(main())
