"""Base and LoRA on the same prompts and the same noise: what each draws, how good and how varied it is.

`measure` looks at one set of weights, `compare` sets two measurements against each other, pair by pair; a training run
measures before its first update and after its last, `evaluate` does both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from . import figures, optional_metrics
from .config import Config, EvalConfig
from .metrics import clip_diversity, compare_velocities, mean_and_stderr, paired_difference
from .models.sd3 import SD3
from .policy import Policy
from .prompts import Prompt
from .rewards._images import quantise
from .rewards.clip import ClipReward
from .rollout import sample
from .scoring import Scores, Scoring
from .seeds import seed_for
from .types import Condition

METRICS = ("reward", "clip_diversity", "w2_drift", "accuracy", "free_diversity")
Progress = Callable[[int, int], None]  # images done, images in all


class LoadedLora(Policy):
    """A LoRA that diffusers has loaded into the model, seen as a policy: measuring needs no optimiser's view of it."""

    def __init__(self, model: SD3) -> None:
        self.model = model
        self._layers = [module for module in model.transformer.modules() if isinstance(module, BaseTunerLayer)]


@dataclass
class Measurement:
    """One set of weights on N prompts with K images each, B = N K; only plain types, so that it can be saved.

    Values of single images are (B,), those of prompts (N,); NaN where a value does not apply.
    """

    prompts: list[str]
    categories: list[str | None]
    prompt: Tensor  # (B,) index into prompts
    images: Tensor  # (B, 3, H, W) uint8
    reward: Tensor  # (B,) in the reward's own unit
    accuracy: Tensor  # (B,) 1: the image shows what the prompt asks for, 0: not, NaN: the prompt is not of the world
    w2_drift: Tensor  # (B,) exactly 0 for the base
    clip_diversity: Tensor  # (N,) mean pairwise 1 - cosine; NaN for K = 1
    free_diversity: Tensor  # (N,) of right images, relative to drawn ones; NaN with under two right images
    free_diversity_weight: Tensor  # (N,) the drawn images' diversity, which weighs it in a mean; NaN with it
    extra: dict[str, Tensor] = field(default_factory=dict)  # optional metrics, (B,) or (N,)
    scores: Scores = field(default_factory=dict)  # each (B,): what the reward is made of, and what is only watched

    @property
    def metrics(self) -> tuple[str, ...]:
        return (*METRICS, *self.extra)

    def values(self, metric: str) -> Tensor:
        """Of single images (B,) or of prompts (N,)."""
        return self.extra[metric] if metric in self.extra else getattr(self, metric)

    def summary(self) -> dict[str, float | None]:
        """Means by metric, None where one does not apply."""
        means = {name: mean_and_stderr(self.values(name))["mean"] for name in self.metrics}
        return {**means, "free_diversity": self.free_diversity_mean}

    @property
    def free_diversity_mean(self) -> float | None:
        """Over all prompts: the diversity of what is right, divided by that of what is drawn."""
        known = ~self.free_diversity.isnan()
        value, weight = self.free_diversity[known].double(), self.free_diversity_weight[known].double()
        return ((value * weight).sum() / weight.sum()).item() if len(value) else None

    def clusters(self, metric: str) -> Tensor:
        """The prompt that each value of the metric belongs to."""
        return self.prompt if len(self.values(metric)) == len(self.prompt) else torch.arange(len(self.prompts))


@dataclass
class Evaluation:
    before: Measurement
    after: Measurement | None = None  # None: there is no LoRA

    def summary(self) -> dict[str, Any]:
        """`compare`, and under "categories" the table of every category, "overall" first."""
        return {**compare(self.before, self.after), "categories": table(self.before, self.after)}

    def save_picture(self, folder: str | Path, rows: int = 8, columns: int = 4) -> Path:
        """before_after.png, or grid.png of the base alone: prompts at even steps through the file, never picked."""
        before, after, total = self.before, self.after, len(self.before.prompts)
        number = len(before.prompt) // total
        columns = min(columns, number)
        chosen = torch.linspace(0, total - 1, min(rows, total)).round().long()
        texts = [before.prompts[i] for i in chosen.tolist()]

        def block(values: Tensor) -> Tensor:
            return values.unflatten(0, (total, number))[chosen, :columns]

        def flags(one: Measurement) -> list[list[bool | None]]:
            return [[None if value != value else bool(value) for value in row] for row in block(one.accuracy).tolist()]

        if after is None:
            return figures.grid(block(before.images).flatten(0, 1), columns, Path(folder) / "grid.png", texts)
        path = Path(folder) / "before_after.png"
        return figures.before_after(path, block(before.images), block(after.images), texts, flags(before), flags(after))


def encode_prompts(model: SD3, prompts: Sequence[Prompt], guidance_scale: float) -> tuple[Condition, Condition | None]:
    """A row per prompt, and with guidance the same of negative prompts ("" where a prompt has none)."""
    condition = model.encode([prompt.text for prompt in prompts])
    if guidance_scale == 1.0:
        return condition, None
    negatives = [prompt.negative or "" for prompt in prompts]
    unique = list(dict.fromkeys(negatives))
    return condition, model.encode(unique).select(torch.tensor([unique.index(text) for text in negatives]))


@torch.no_grad()
def measure(
    policy: Policy | None,
    model: SD3,
    scorer: Scoring | Any,
    prompts: Sequence[Prompt],
    config: EvalConfig,
    height: int,
    width: int,
    *,
    condition: Condition | None = None,
    negative: Condition | None = None,
    shift: float | None = None,
    solver: str = "euler",
    reference: Measurement | None = None,
    embedder: Any = None,
    metrics: Sequence[str] = (),
    dino: str = "facebook/dinov2-base",
    progress: Progress | None = None,
) -> Measurement:
    """Measures the model's weights as they are: drift is against `policy.reference()`, and 0 without a policy.

    For the base of a policy: `with policy.reference(): measure(None, ...)`. An image's noise comes from `config.seed`,
    its prompt's text and its number, whatever else is in the file. `condition` (N rows) and `negative` spare the text
    encoders. A normalised reward is in the units of `reference`, the measurement that this one is compared with.
    Diversity is measured on the `embedder`'s features, without one on those of the reward where it has some. `metrics`
    are optional ones of optional_metrics.py. UserError for a size that the model has not.
    """
    scoring = scorer if isinstance(scorer, Scoring) else Scoring({"reward": scorer})
    if condition is None:
        condition, negative = encode_prompts(model, prompts, config.guidance_scale)
    shape, sigmas = model.latent_shape(height, width), model.sigmas(config.num_inference_steps, shift, height, width)
    number = config.samples_per_prompt
    index = torch.arange(len(prompts)).repeat_interleave(number)
    repeated = [prompt for prompt in prompts for _ in range(number)]
    texts = [prompt.text for prompt in repeated]
    seeds = [seed_for(config.seed, "evaluation", text, row % number) for row, text in enumerate(texts)]
    training = model.transformer.training
    model.transformer.eval()
    parts = []
    for start in range(0, len(texts), config.batch_size):
        rows = slice(start, start + config.batch_size)
        options = {"solver": solver, "guidance_scale": config.guidance_scale, "negative": negative}
        clean = sample(
            model, condition, index[rows], seeds[rows], sigmas, shape, batch_size=config.batch_size, **options
        )
        images = model.decode(clean, config.batch_size)
        scores, embeddings = scoring.with_embeddings(images, repeated[rows], embedder)
        drift, ratio = torch.zeros(len(clean)), torch.ones(len(clean))
        if policy is not None:
            found = compare_velocities(policy, clean, condition, index[rows], seeds[rows], batch_size=config.batch_size)
            drift, ratio = (values.mean(1) for values in found)
        embeddings = torch.full((len(clean), 1), float("nan")) if embeddings is None else embeddings.cpu()
        parts.append((quantise(images).cpu(), embeddings, drift, ratio, *scores.values()))
        if progress:
            progress(min(start + config.batch_size, len(texts)), len(texts))
    model.transformer.train(training)
    images, embeddings, drift, ratio, *values = (torch.cat(part) for part in zip(*parts, strict=True))
    scores = dict(zip(scoring.scorers, values, strict=True))
    accuracy, free, weight = _verify(images, texts, number)
    given = None if embeddings.isnan().all() else embeddings
    extra = optional_metrics.by_prompt(metrics, images, index, given, dino, str(model.device))
    extra |= {"velocity_norm_ratio": ratio} if "velocity_norm_ratio" in metrics else {}
    return Measurement(
        prompts=[prompt.text for prompt in prompts],
        categories=[prompt.category for prompt in prompts],
        prompt=index,
        images=images,
        reward=scoring.total(scores, reference.scores if reference else None),
        accuracy=accuracy,
        w2_drift=drift,
        clip_diversity=clip_diversity(embeddings, index),
        free_diversity=free,
        free_diversity_weight=weight,
        extra=extra,
        scores=scores,
    )


def load_embedder(config: Config, device: Any) -> Any:
    """The CLIP of `eval.embedder`; else None for a CLIP reward, whose own is taken, and for want of one.

    Diversity must not change its meaning with the reward, so the built-in model has the built-in CLIP.
    """
    shared = isinstance(config.reward, ClipReward) and config.reward.model == "shapes"
    chosen = config.eval.embedder or ("shapes" if config.model == "shapes" and not shared else None)
    return ClipReward(model=chosen, pretrained=config.eval.embedder_pretrained).load(device) if chosen else None


def _verify(images: Tensor, texts: Sequence[str], number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Accuracy (B,), free diversity (N,) and its weights (N,); NaN outside the built-in world."""
    from .shapes.grammar import parse  # late: other models do not need the built-in world
    from .shapes.verifier import assess, free_spread

    nan = float("nan")
    accuracy, prompts = torch.full((len(texts),), nan), texts[::number]
    free, weight = torch.full((len(prompts),), nan), torch.full((len(prompts),), nan)
    if not any(parse(text) for text in prompts):
        return accuracy, free, weight
    answers = assess(images.float() / 255, texts)
    accuracy = torch.tensor([nan if answer is None else float(answer) for answer, _ in answers])
    for row, prompt in enumerate(prompts):
        right = [attributes for _, attributes in answers[row * number : (row + 1) * number] if attributes is not None]
        if len(right) > 1:
            own, weight[row] = free_spread(prompt, right)
            free[row] = own / weight[row]
    return accuracy, free, weight


def evaluate(
    policy: Policy | None,
    model: SD3,
    scorer: Scoring | Any,
    prompts: Sequence[Prompt],
    config: EvalConfig,
    height: int,
    width: int,
    *,
    before: Measurement | None = None,
    progress: Callable[[str], Progress] | None = None,
    **options: Any,
) -> Evaluation:
    """Base, and LoRA where there is a policy. `before` is reused; `progress("before")` makes the callback of a phase.

    `options` are those of `measure`; the prompts are encoded once.
    """
    if options.get("condition") is None:
        options["condition"], options["negative"] = encode_prompts(model, prompts, config.guidance_scale)

    def run(weights: Policy | None, phase: str, reference: Measurement | None = None) -> Measurement:
        options["progress"] = progress(phase) if progress else None
        return measure(weights, model, scorer, prompts, config, height, width, reference=reference, **options)

    if before is None:
        with policy.reference() if policy else nullcontext():
            before = run(None, "before")
    return Evaluation(before, run(policy, "after", before) if policy else None)


def compare(before: Measurement, after: Measurement | None) -> dict[str, Any]:
    """{"before", "after": {metric: value}, "difference": {metric: {"mean", "stderr"}}}, None where not applicable.

    Differences are paired by noise, their errors clustered by prompt (`metrics.paired_difference`). The error of
    free_diversity is that of its unweighted mean over the prompts that have it both times.
    """
    if after is None:
        return {"before": before.summary(), "after": None, "difference": None}
    if before.prompts != after.prompts or before.prompt.shape != after.prompt.shape:
        raise ValueError("the two measurements are of other prompts or other numbers of images: they cannot be paired")
    summary = {"before": before.summary(), "after": after.summary()}
    difference = {name: _paired(before, after, name) for name in before.metrics}
    first, second = before.free_diversity_mean, after.free_diversity_mean
    difference["free_diversity"]["mean"] = None if first is None or second is None else second - first
    return {**summary, "difference": difference}


def _paired(before: Measurement, after: Measurement, name: str, rows: Tensor | None = None) -> dict[str, float | None]:
    clusters = before.clusters(name)
    rows = torch.ones(len(clusters), dtype=torch.bool) if rows is None else rows
    return paired_difference(before.values(name)[rows], after.values(name)[rows], clusters[rows])


def table(before: Measurement, after: Measurement | None = None) -> dict[str, dict[str, Any]]:
    """Per category, "overall" first: "images", "prompts", and per metric {"before", "after", "difference"}, each with
    "mean" and "stderr" (clustered by prompt)."""
    names = list(dict.fromkeys(name for name in before.categories if name is not None))
    groups = {"overall": range(len(before.prompts))}
    groups |= {name: [i for i, other in enumerate(before.categories) if other == name] for name in names}
    return {name: _row(before, after, torch.tensor(list(members))) for name, members in groups.items()}


def _row(before: Measurement, after: Measurement | None, members: Tensor) -> dict[str, Any]:
    row: dict[str, Any] = {"prompts": len(members), "images": int(torch.isin(before.prompt, members).sum())}
    for name in before.metrics:
        rows = torch.isin(before.clusters(name), members)
        cells = {"before": mean_and_stderr(before.values(name)[rows], before.clusters(name)[rows])}
        if after is not None:
            cells["after"] = mean_and_stderr(after.values(name)[rows], after.clusters(name)[rows])
            cells["difference"] = _paired(before, after, name, rows)
        row[name] = cells
    return row
