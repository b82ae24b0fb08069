"""The end of a run: summary, LoRA with its model card, pictures, and what is printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import figures
from .evaluation import Evaluation, Measurement, compare
from .export import model_card, save_lora, save_transformer, verify_lora, verify_transformer
from .provenance import versions
from .samples import save_samples

if TYPE_CHECKING:
    from .run import Run


def summarise(run: Run, before: Measurement, after: Measurement) -> dict[str, Any]:
    """What summary.json holds."""
    return {
        "objective": run.config.objective.name,
        "seed": run.config.seed,
        "epochs": run.trainer.epoch,
        "images": run.trainer.epoch * run.trainer.samples,
        "seconds": run.seconds(),
        "ended_early": run.judge.ended,
        "model": run.config.model,
        "reward": f"{run.scorer.unit}, {run.scorer.encoder}",
        "test_prompts": run.plan.description["test"],
        "versions": versions(),
        **compare(before, after),
        **run.scorer.compared(before.scores, after.scores, before.prompt),
    }


def write(run: Run, before: Measurement, after: Measurement, summary: dict[str, Any]) -> None:
    """Everything that a finished run leaves; the measurement first, so that nothing after it can cost it."""
    folder, result = run.folder, run.folder / "summary.json"
    result.write_text(json.dumps(summary, indent=2) + "\n")
    if run.config.finetune == "full":
        weights = save_transformer(run.model.transformer, folder)
        summary["transformer_difference"] = verify_transformer(weights, run.model, run.policy.velocity)
    else:
        weights = save_lora(run.model.transformer, folder / "lora")
        summary["lora_difference"] = verify_lora(folder / "lora", run.model, run.policy.velocity)
    result.write_text(json.dumps(summary, indent=2) + "\n")
    evaluation = Evaluation(before, after)
    save_samples(evaluation, folder)
    picture = evaluation.save_picture(folder)
    figures.curves(folder / "metrics.jsonl", folder / "curves.png")
    if run.config.finetune == "lora":
        card = model_card(
            summary,
            base_model=run.config.model,
            reward=summary["reward"],
            prompts=str(run.plan.description["train"]),
            sampling=_sampling(run),
            t5=run.model.has_t5,
        )
        (folder / "lora" / "README.md").write_text(card)
    _show(run, summary, weights, picture)


def _sampling(run: Run) -> dict[str, Any]:
    rollout, evaluation = run.config.rollout, run.config.eval
    return {
        "height": rollout.height,
        "width": rollout.width,
        "num_inference_steps": evaluation.num_inference_steps,
        "guidance_scale": evaluation.guidance_scale,
        "max_sequence_length": rollout.max_sequence_length,
    }


def _show(run: Run, summary: dict[str, Any], weights: Path, picture: Path) -> None:
    print(f"\n{'':16}{'before':>10}{'after':>10}{'difference':>14}")
    for name, before in summary["before"].items():
        if before is not None and summary["after"][name] is not None:
            print(_row(name, before, summary["after"][name], summary["difference"][name]))
    for kind in ("rewards", "watch"):
        for name, row in summary[kind].items() if len(run.scorer.scorers) > 1 else ():
            label = f"{kind.removesuffix('s')} {name}"
            print(_row(label, row["before"]["mean"], row["after"]["mean"], row["difference"]), "", row["unit"])
    print(f"\nreward is {summary['reward']}; clip_diversity also falls when wrong images vanish")
    kind, title = ("transformer", "transformer") if run.config.finetune == "full" else ("lora", "LoRA")
    difference = summary[f"{kind}_difference"]
    print(f"{title}: {weights}, reloaded into a stock pipeline: velocities differ by at most {difference:.1e}")
    print(f"look at {picture}")
    sample = f", or python -m sd3_adrpo.sample PROMPT --lora {run.folder} --strip" if kind == "lora" else ""
    print(f"next: python eval/report.py {run.folder}{sample}")


def _row(name: str, before: float, after: float, paired: dict[str, float | None]) -> str:
    error = f" ± {paired['stderr']:.4f}" if paired["stderr"] is not None else ""
    return f"{name:16}{before:10.4f}{after:10.4f}{paired['mean']:+14.4f}{error}"
