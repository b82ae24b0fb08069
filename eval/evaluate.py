"""Base and LoRA on the same prompts and noise: `python eval/evaluate.py --lora runs/.../lora`; --help lists options.

Writes evaluation.json, before_after.png (grid.png without a LoRA) and every image under samples/. Options not given are
those of the run that the LoRA lies in, if it does, else of the model's preset. Under torchrun the processes share the
images.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sd3_adrpo import cli, plan, prompt_choice
from sd3_adrpo import optional_metrics as optional
from sd3_adrpo.config import Config
from sd3_adrpo.errors import UserError, exit_code
from sd3_adrpo.geneval import check_geneval, write_geneval
from sd3_adrpo.loading import present_lora, run_of
from sd3_adrpo.prompts import Prompt, file_hash, read_prompts
from sd3_adrpo.provenance import versions

OPTIONS = {  # ours -> the option of a training run that it sets
    "model": ("model", '"shapes" (built in), a hub id or a local folder'),
    "config": ("config", "YAML file of a run, or a preset's name"),
    "samples_per_prompt": ("eval.samples_per_prompt", "images of each prompt"),
    "num_inference_steps": ("eval.num_inference_steps", "steps of the ODE solver"),
    "guidance_scale": ("eval.guidance_scale", "1 is none"),
    "batch_size": ("eval.batch_size", "images at a time; does not change them"),
    "seed": ("eval.seed", "of the noise"),
    "embedder": ("eval.embedder", "CLIP of clip_diversity and of --metrics; none: a clip reward's own"),
    "embedder_pretrained": ("eval.embedder_pretrained", "with a name: its tag, or a weight file"),
    "height": ("rollout.height", "pixels"),
    "width": ("rollout.width", "pixels"),
    "max_sequence_length": ("rollout.max_sequence_length", "T5 tokens; as in training"),
    "mixed_precision": ("train.mixed_precision", "no, fp16 or bf16"),
}
PROGRAM, RESULT = "evaluate.py", "evaluation.json"


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, Config]:
    """Exits with 2 on anything unknown or ill-typed."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__, allow_abbrev=False)
    parser.add_argument("--lora", type=Path, help="folder of a run or of its LoRA, or a file; none: the base alone")
    parser.add_argument(
        "--prompts", help="prompt file, all of which is used; none: the test prompts of the run or model"
    )
    parser.add_argument("--output_dir", type=Path, help="none: a new dated folder under runs/")
    parser.add_argument("--metrics", help="more of them, between commas: " + ", ".join(optional.NAMES))
    parser.add_argument("--reference_images", type=Path, help="folder for cmmd, kid, fid, ...; none: the base's images")
    parser.add_argument("--dino_model", default="facebook/dinov2-base", help="hub id or folder, for dino_diversity")
    parser.add_argument("--geneval_dir", type=Path, help="writes base/ and lora/ as GenEval's own scorer reads them")
    for name, (_, text) in OPTIONS.items():
        parser.add_argument(f"--{name}", help=text)
    argv = list(sys.argv[1:] if argv is None else argv)
    args, unknown = parser.parse_known_args(argv)
    rewards, unknown = _reward_options(unknown)
    if unknown:
        names = [*OPTIONS, *(action.dest for action in parser._actions), "reward", "watch"]
        parser.error(f"unknown option {unknown[0]}{cli.nearest(unknown[0].lstrip('-'), names, '--')}")
    given = {target: getattr(args, name) for name, (target, _) in OPTIONS.items() if getattr(args, name) is not None}
    if args.lora and "config" not in given:
        if run := run_of(args.lora):
            given["config"] = str(run / "config.yaml")
    return args, cli.parse([f"--{name}={value}" for name, value in given.items()] + rewards, PROGRAM)


def _reward_options(words: list[str]) -> tuple[list[str], list[str]]:
    """(those of --reward and --watch, which are the training's own; the others)."""
    rewards: list[str] = []
    others: list[str] = []
    mine = False
    for word in words:
        if word.startswith("--"):
            mine = re.match(r"--(reward|watch|reward_timeout|reward_retries)\b(?!_)", word) is not None
        (rewards if mine else others).append(word)
    return rewards, others


def choose_prompts(config: Config, file: str | None) -> tuple[list[Prompt], dict[str, Any]]:
    """The prompts, and where they are from."""
    if file is None:
        _, test, description = prompt_choice.resolve_prompts(config)
        return test, description["test"]
    path = prompt_choice.find_prompts(file)
    prompts = read_prompts(path)
    return prompts, {"file": str(path), "part": "all", "sha256": file_hash(path), "prompts": len(prompts)}


def output_folder(folder: Path | None) -> Path:
    folder = folder or Path("runs") / time.strftime("%Y-%m-%d_%H-%M-%S_evaluation")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir {folder} is a file: give a folder")
    if (folder / RESULT).exists():
        raise UserError(f"output_dir {folder} holds an {RESULT} already: give another folder, or move that file away")
    return folder


class Task(NamedTuple):
    """What is to be measured, and where it goes."""

    prompts: list[Prompt]
    description: dict[str, Any]  # of the prompts
    folder: Path
    metrics: tuple[str, ...]  # those on request
    files: list[Path]  # reference images


def check(args: argparse.Namespace, config: Config) -> Task:
    """UserError for what would stop the evaluation later; loads nothing."""
    for name in ("samples_per_prompt", "num_inference_steps", "batch_size"):
        if getattr(config.eval, name) < 1:
            raise UserError(f"{name} is {getattr(config.eval, name)}; it must be at least 1")
    prompts, description = choose_prompts(config, args.prompts)
    folder, names = output_folder(args.output_dir), optional.parse_names(args.metrics)
    files = optional.check(names, args.reference_images, len(prompts) * config.eval.samples_per_prompt)
    if args.geneval_dir:
        check_geneval(prompts, args.geneval_dir)
    if args.lora:
        present_lora(args.lora)
    for reward in (config.reward, *([] if config.watch.name == "none" else [config.watch])):
        plan.check_reward(reward, prompts)
    return Task(prompts, description, folder, names, files)


def run(args: argparse.Namespace, config: Config) -> Path:
    """The whole evaluation; returns the path of its result."""
    task, started = check(args, config), time.monotonic()
    where = f"{task.description['file']} ({task.description['part']})"
    if os.environ.get("RANK", "0") == "0":
        print(f"{len(task.prompts)} prompts of {where}, loading {config.model}", flush=True)
    from accelerate import Accelerator  # from here on things load for seconds

    from sd3_adrpo import evaluation
    from sd3_adrpo.loading import load_lora, load_model
    from sd3_adrpo.scoring import Scoring

    accelerator = Accelerator()  # it also chooses the process's device
    model = load_model(config)
    path = load_lora(model, args.lora) if args.lora else None
    scorer, embedder = Scoring.load(config, model.device), evaluation.load_embedder(config, model.device)
    embeds = embedder or scorer.embedder
    optional.prepare(task.metrics, embeds, args.dino_model, str(model.device))
    reference = optional.embed_files(task.files, embeds) if task.files else None
    policy = evaluation.LoadedLora(model) if path else None
    extras = {"embedder": embedder, "dino": args.dino_model, "accelerator": accelerator}
    measured = measure(task, config, policy, model, scorer, **extras)
    if not accelerator.is_main_process:
        return task.folder / RESULT
    summary = {
        "model": config.model,
        "lora": str(path) if path else None,
        "reward": f"{scorer.unit}, {scorer.encoder}",
        "prompts": task.description,
        "settings": {**vars(config.eval), "height": config.rollout.height, "width": config.rollout.width},
        "seconds": round(time.monotonic() - started, 1),
        "versions": versions(),
        **measured.summary(),
        **scorer.compared(measured.before.scores, getattr(measured.after, "scores", None), measured.before.prompt),
    }
    sides = {"before": measured.before} | ({"after": measured.after} if policy else {})
    if distances := optional.compare_sets(task.metrics, sides, reference, embeds):
        summary["distances"] = distances
    write(task, measured, summary, args.geneval_dir)
    return task.folder / RESULT


def measure(task: Task, config: Config, policy: Any, model: Any, scorer: Any, **options: Any) -> Any:
    """The Evaluation of the base and, with a policy, of the LoRA. The text encoders are dropped on the way."""
    from tqdm import tqdm

    from sd3_adrpo import evaluation

    accelerator = options["accelerator"]
    with accelerator.local_main_process_first():  # the others find its embeddings on disk
        condition, negative = evaluation.encode_prompts(model, task.prompts, config.eval.guidance_scale)
    model.drop_text_encoders()

    def progress(phase: str) -> evaluation.Progress:
        total, quiet = len(task.prompts) * config.eval.samples_per_prompt, not accelerator.is_main_process
        bar = tqdm(desc=phase, unit="img", total=total, disable=quiet, dynamic_ncols=True)
        return lambda done, total: (bar.update(done - bar.n), bar.close() if done == total else None)

    rollout = config.rollout
    options |= {"condition": condition, "negative": negative, "shift": rollout.shift, "progress": progress}
    options |= {"metrics": task.metrics}
    return evaluation.evaluate(
        policy, model, scorer, task.prompts, config.eval, rollout.height, rollout.width, **options
    )


def write(task: Task, measured: Any, summary: dict[str, Any], geneval: Path | None) -> None:
    """Pictures, images and numbers, and a word about them."""
    from sd3_adrpo.samples import save_samples

    task.folder.mkdir(parents=True, exist_ok=True)
    picture = measured.save_picture(task.folder)
    save_samples(measured, task.folder)
    for phase, one in (("base", measured.before), ("lora", measured.after)):
        if geneval and one is not None:
            write_geneval(task.prompts, one.images, geneval / phase)
    result = task.folder / RESULT
    result.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print_tables(summary)
    print(f"\nlook at {picture}; the numbers are in {result}")


def print_tables(summary: dict[str, Any]) -> None:
    """All metrics over all prompts, then reward and accuracy of every category; ± is a standard error."""
    overall, *categories = summary["categories"].items()
    columns = ["before"] if summary["after"] is None else ["before", "after", "difference"]
    print(f"\n{'':24}" + "".join(f"{column:>22}" for column in columns))
    for name in summary["before"]:
        cells = [_cell(overall[1][name][column]) for column in columns]
        if name == "free_diversity":  # over all prompts it is weighted, see evaluation.Measurement
            cells = [_cell({"mean": summary[column][name], "stderr": None}) for column in columns[:2]]
            cells += [_cell(summary["difference"][name])] if len(columns) > 1 else []
        print(f"{name:24}" + "".join(f"{cell:>22}" for cell in cells))
    for metric in ("reward", "accuracy") if categories else ():
        if summary["before"][metric] is not None:
            print(f"\n{metric + ' by category':24}" + "".join(f"{column:>22}" for column in columns))
            for name, row in categories:
                label = f"{name[:17]} ({row['prompts']})"
                print(f"{label:24}" + "".join(f"{_cell(row[metric][column]):>22}" for column in columns))
    for phase in ("before", "after"):
        for name, value in summary.get("distances", {}).get(phase, {}).items():
            print(f"\n{name} {phase} {value:.4f} against {summary['distances']['reference']}", end="")
    print(f"\nreward is {summary['reward']}; accuracy and diversity are shares; ± is a standard error, by prompt")
    print("clip_diversity also falls when wrong images vanish; free_diversity looks at right images only")


def _cell(value: dict[str, float | None]) -> str:
    if value["mean"] is None:
        return "-"
    return f"{value['mean']:.4f}" + (f" ± {value['stderr']:.4f}" if value["stderr"] is not None else "")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 an error the user can mend (one message, no traceback), 2 bad options."""
    args, config = parse(argv)
    return exit_code(PROGRAM, lambda: run(args, config))


if __name__ == "__main__":
    sys.exit(main())
