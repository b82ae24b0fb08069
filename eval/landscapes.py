"""Objectives on reward landscapes in the plane: `python eval/landscapes.py [--output_dir D]`, minutes on a CPU.

Shows whether an objective finds the higher of two modes, crosses a plateau, is deceived, or is misled by noise, and
what it costs in entropy and drift. Writes landscapes.json, table.md, and for every landscape the samples over training
and the curves.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sd3_adrpo import cli, comparison
from sd3_adrpo.landscapes import LANDSCAPES, Run, Trace, train_base
from sd3_adrpo.objective import Objective

CURVES = ("reward", "entropy", "drift", "found")
SHOWN = 5  # moments of training that are drawn


def objective(text: str) -> Objective:
    """`adrpo` or `adrpo beta0=0.3 penalty=fixed`; what is not given is as for SD3.5, not as tuned for drawn shapes."""
    name, *options = text.split()
    config = cli.parse(
        ["--config=sd3.5-medium", f"--objective={name}", *(f"--objective.{option}" for option in options)]
    )
    importlib.import_module(f"sd3_adrpo.objectives.{name}")
    return config.objective


def draw(landscape: str, traces: dict[str, Trace], path: Path) -> None:
    """A row per objective: samples over the landscape at even steps through training."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    axis = torch.linspace(-4, 4, 120)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).flatten(0, 1)
    height = LANDSCAPES[landscape](grid).view(120, 120)
    figure, axes = plt.subplots(len(traces), SHOWN, figsize=(2 * SHOWN, 2 * len(traces)), squeeze=False)
    for row, (name, trace) in zip(axes, traces.items(), strict=True):
        for cell, epoch in zip(row, torch.linspace(0, len(trace.reward) - 1, SHOWN).long().tolist(), strict=True):
            cell.contourf(axis, axis, height, 12, cmap="Greys", alpha=0.7)
            cell.scatter(*trace.samples[epoch].T, s=1.5, color="C0", linewidths=0)
            cell.set(xlim=(-4, 4), ylim=(-4, 4), xticks=[], yticks=[])
            cell.set_title(f"epoch {epoch}: reward {trace.reward[epoch]:.2f}", fontsize=7)
        row[0].set_ylabel(name, fontsize=8)
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_curves(results: dict[str, dict[str, list[Trace]]], path: Path) -> None:
    """Rows landscapes, columns reward, entropy, drift, found; a line per objective, the mean over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(results), len(CURVES), figsize=(3 * len(CURVES), 2.2 * len(results)), squeeze=False)
    for row, (landscape, by_name) in zip(axes, results.items(), strict=True):
        for cell, curve in zip(row, CURVES, strict=True):
            for name, traces in by_name.items():
                cell.plot(torch.tensor([getattr(trace, curve) for trace in traces]).mean(0), label=name, linewidth=1)
            cell.set_title(f"{landscape}: {curve}", fontsize=8)
            cell.tick_params(labelsize=7)
    axes[0][0].legend(fontsize=6, frameon=False)
    figure.tight_layout(pad=0.5)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def table(results: dict[str, dict[str, list[Trace]]]) -> str:
    lines = ["| landscape | objective | " + " | ".join(CURVES) + " |", "|" + "---|" * (2 + len(CURVES))]
    for landscape, by_name in results.items():
        for name, traces in by_name.items():
            cells = []
            for curve in CURVES:
                mean, half = comparison.mean_and_interval([getattr(trace, curve)[-1] for trace in traces])
                cells.append(f"{mean:.3f}" + (f" ± {half:.3f}" if half is not None else ""))
            lines.append(f"| {landscape} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def record(trace: Trace) -> dict[str, Any]:
    return {curve: [round(value, 5) for value in getattr(trace, curve)] for curve in CURVES}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="landscapes.py", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--objectives", default=",".join(cli.available("objective")), help="'NAME KEY=VALUE ...' with commas"
    )
    parser.add_argument("--landscapes", default=",".join(LANDSCAPES), help="names with commas")
    parser.add_argument("--seeds", default="0,1,2", help="numbers with commas")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/landscapes"))
    args = parser.parse_args(argv)
    unknown = set(args.landscapes.split(",")) - LANDSCAPES.keys()
    if unknown:
        parser.error(f"unknown landscape {', '.join(sorted(unknown))}; known are {', '.join(LANDSCAPES)}")
    objectives = {text: objective(text) for text in args.objectives.split(",")}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # points are too small to share
    base, results = train_base(), {}
    total = len(args.landscapes.split(",")) * len(objectives) * len(args.seeds.split(","))
    with tqdm(total=total, desc="runs", dynamic_ncols=True) as bar:
        for landscape in args.landscapes.split(","):
            results[landscape] = {}
            for name, chosen in objectives.items():
                results[landscape][name] = []
                for seed in args.seeds.split(","):
                    results[landscape][name].append(Run(chosen, landscape, base, int(seed))(args.epochs))
                    bar.update()
            first = {name: traces[0] for name, traces in results[landscape].items()}
            draw(landscape, first, args.output_dir / f"{landscape}.png")
    draw_curves(results, args.output_dir / "curves.png")
    command = shlex.join(["python", "eval/landscapes.py", *argv])
    raw = {scape: {n: [record(t) for t in traces] for n, traces in row.items()} for scape, row in results.items()}
    (args.output_dir / "landscapes.json").write_text(json.dumps({"command": command, "results": raw}) + "\n")
    (args.output_dir / "table.md").write_text(f"`{command}`\n\n{table(results)}")
    print(table(results) + f"\nlook at {args.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
