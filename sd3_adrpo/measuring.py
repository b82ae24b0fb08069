"""One set of weights on prompts: what it draws, how good, how varied and how far from the base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from . import optional_metrics
from .config import Config, EvalConfig
from .metrics import DRIFT_SIGMAS, clip_diversity, compare_velocities, mean_and_stderr
from .models.sd3 import SD3
from .parallel import ALONE, failing_together, gather_rows, share
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
    by_sigma: dict[str, Tensor] = field(default_factory=dict)  # w2_drift, velocity_norm_ratio: (B, DRIFT_SIGMAS) each

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


def encode_prompts(model: SD3, prompts: Sequence[Prompt], guidance_scale: float) -> tuple[Condition, Condition | None]:
    """A row per prompt, and with guidance the same of negative prompts ("" where a prompt has none)."""
    condition = model.encode([prompt.text for prompt in prompts])
    if guidance_scale == 1.0:
        return condition, None
    return condition, model.encode([prompt.negative or "" for prompt in prompts])


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
    accelerator: Accelerator | None = None,
) -> Measurement:
    """Measures the model's weights as they are: drift is against `policy.reference()`, and 0 without a policy.

    For the base of a policy: `with policy.reference(): measure(None, ...)`. An image's noise comes from `config.seed`,
    its prompt's text and its number, whatever else is in the file. `condition` (N rows) and `negative` spare the text
    encoders. A normalised reward is in the units of `reference`, the measurement that this one is compared with.
    Diversity is measured on the `embedder`'s features, without one on those of the reward where it has some. `metrics`
    are optional ones of optional_metrics.py. The processes of an `accelerator` draw and score a share of the images
    each and all return the whole, the same as one process's to rounding. UserError for a size that the model has not.
    """
    scoring = scorer if isinstance(scorer, Scoring) else Scoring({"reward": scorer})
    if condition is None:
        condition, negative = encode_prompts(model, prompts, config.guidance_scale)
    sigmas = model.sigmas(config.num_inference_steps, shift, height, width)
    field = {"condition": condition, "negative": negative, "sigmas": sigmas, "solver": solver}
    field["shape"] = model.latent_shape(height, width)
    images, embeddings, drift, ratio, scores = _draw(
        policy, model, scoring, prompts, config, field, embedder, progress or (lambda done, total: None), accelerator
    )
    number = config.samples_per_prompt
    index = torch.arange(len(prompts)).repeat_interleave(number)
    accuracy, free, weight = _verify(images, [prompts[i].text for i in index.tolist()], number)
    given = None if embeddings.isnan().all() else embeddings
    extra = optional_metrics.by_prompt(metrics, images, index, given, dino, str(model.device))
    extra |= {"velocity_norm_ratio": ratio.mean(1)} if "velocity_norm_ratio" in metrics else {}
    return Measurement(
        prompts=[prompt.text for prompt in prompts],
        categories=[prompt.category for prompt in prompts],
        prompt=index,
        images=images,
        reward=scoring.total(scores, reference.scores if reference else None),
        accuracy=accuracy,
        w2_drift=drift.mean(1),
        clip_diversity=clip_diversity(embeddings, index),
        free_diversity=free,
        free_diversity_weight=weight,
        extra=extra,
        scores=scores,
        by_sigma={"w2_drift": drift, "velocity_norm_ratio": ratio},
    )


def _draw(
    policy: Policy | None,
    model: SD3,
    scoring: Scoring,
    prompts: Sequence[Prompt],
    config: EvalConfig,
    field: dict[str, Any],
    embedder: Any,
    progress: Progress,
    accelerator: Accelerator | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Scores]:
    """uint8 images (B, 3, H, W), embeddings (B, E) (NaN without), drift and norm ratio (B, sigmas), scores by name."""
    repeated = [prompt for prompt in prompts for _ in range(config.samples_per_prompt)]
    index = torch.arange(len(prompts)).repeat_interleave(config.samples_per_prompt)
    seeds = [
        seed_for(config.seed, "evaluation", prompt.text, row % config.samples_per_prompt)
        for row, prompt in enumerate(repeated)
    ]
    batch, training, parts = config.batch_size, model.transformer.training, []
    options = {**field, "guidance_scale": config.guidance_scale, "batch_size": batch}
    total = len(repeated)
    processes = accelerator if accelerator is not None and accelerator.num_processes <= total else ALONE
    mine = share(total, processes)
    model.transformer.eval()
    with failing_together(processes):
        for start in range(mine.start, mine.stop, batch):
            rows = slice(start, min(start + batch, mine.stop))
            clean = sample(model, prompt_index=index[rows], seeds=seeds[rows], **options)
            images = model.decode(clean)
            scores, embeddings = scoring.with_embeddings(images, repeated[rows], embedder)
            drift = torch.zeros(len(clean), len(DRIFT_SIGMAS))
            ratio = torch.ones_like(drift)
            if policy is not None:
                where = clean, field["condition"], index[rows], seeds[rows]
                drift, ratio = compare_velocities(policy, *where, batch_size=batch)
            embeddings = torch.full((len(clean), 1), float("nan")) if embeddings is None else embeddings.cpu()
            parts.append((quantise(images).cpu(), embeddings, drift, ratio, *scores.values()))
            progress(round((rows.stop - mine.start) / (mine.stop - mine.start) * total), total)  # if all are as fast
    model.transformer.train(training)
    columns = [gather_rows(torch.cat(part), total, processes) for part in zip(*parts, strict=True)]
    images, embeddings, drift, ratio, *values = columns
    return images, embeddings, drift, ratio, dict(zip(scoring.scorers, values, strict=True))


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
