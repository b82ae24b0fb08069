"""A run from its folder's point of view: set up, measure, train, measure again, export; log and save all the while.

config.yaml  prompts.json  metrics.jsonl  grids/  checkpoints/  lora/  samples/  before_after.png  summary.json
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers.utils import logging as diffusers_logging
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from . import cli, log, result
from .base_cache import BaseCache
from .canary import check_learning
from .checkpoint import find_checkpoint, load_checkpoint, prune, save_checkpoint
from .collect import Collector
from .compiling import compile_blocks
from .config import Config
from .errors import UserError
from .evaluation import Measurement, encode_prompts, load_embedder
from .folders import dated_folder, text_cache_folder, write_whole
from .full import FullPolicy
from .judging import Judge
from .models.sd3 import SD3
from .pairs import PairCollector
from .parallel import patience
from .plan import Plan
from .policy import Policy
from .scoring import Scoring
from .sharding import asked_to_shard
from .trainer import Interrupted, Trainer
from .types import DTYPES
from .watching import sampled_accuracy, sampled_diversity

logging.getLogger("diffusers.loaders.lora_base").setLevel(logging.ERROR)  # a LoRA has no text encoder part: no news
diffusers_logging.disable_progress_bar()
transformers_logging.disable_progress_bar()
DRIFTS = ("w2", "w2_old", "velocity_norm_ratio")  # of an epoch's last update, beside its rollout's metrics


class Run:
    """One training run. Raises UserError for what the user can mend; whatever was written stays."""

    def __init__(self, config: Config, plan: Plan) -> None:
        self.config, self.plan, self.started = config, plan, time.monotonic()
        self.resumed = config.resume_from_checkpoint and find_checkpoint(
            config.resume_from_checkpoint, config.output_dir
        )
        tracker = None if config.report_to == "none" else config.report_to
        self.accelerator = Accelerator(log_with=tracker, project_dir=".", kwargs_handlers=[patience(config)])
        self.main = self.accelerator.is_main_process
        self.sharded = asked_to_shard(self.accelerator.num_processes)
        if self.sharded and config.compile:
            raise UserError("compile is on, and the accelerate config asks for FSDP: one of the two only")
        self.folder = self._make_folder()
        self.accelerator.project_configuration.logging_dir = str(self.folder)

    def _make_folder(self) -> Path:
        if self.resumed:
            return self.resumed.parent.parent
        made = [None]
        if self.main:
            named = self.config.output_dir
            made = [str(named or dated_folder(f"{self.config.objective.name}_seed{self.config.seed}"))]
            Path(made[0]).mkdir(parents=True, exist_ok=True)
        broadcast_object_list(made)
        return Path(made[0])

    def _write_options(self) -> None:
        """Of a run that goes on, with what it was given anew: not before that is known to fit its checkpoint."""
        if self.main:
            write_whole(self.folder / "config.yaml", cli.dump(replace(self.config, resume_from_checkpoint=None)))
            write_whole(self.folder / "prompts.json", json.dumps(self.plan.description, indent=2) + "\n")

    def __call__(self) -> dict[str, Any]:
        if not self.resumed:
            self._write_options()
        self._load()
        if self.resumed:
            self.trainer.load_state_dict(load_checkpoint(self.resumed))
            self._write_options()
            self._say(f"resumed from {self.resumed}, epoch {self.trainer.epoch} of {self.config.epochs}")
        else:
            check_learning(self.policy, self.config.objective, self.trainer.condition, self.trainer.shape)
            self._write({"kind": "scores", **self.scorer.units})  # what the names in the log mean
        before = self.judge.before(bool(self.resumed), self.base_cache)
        self._start_trackers()
        self.trainer.stop_on_signals()
        try:
            while self.trainer.epoch < self.config.epochs and not self.judge.ended:
                self._epoch()
            if self.judge.ended:  # between two checkpoints, maybe
                self._save()
        except Interrupted:
            self._save()
            self._say(f"stopped and saved; go on with --resume_from_checkpoint {self.folder}")
            raise SystemExit(130) from None
        except BaseException:
            if self.accelerator.num_processes == 1 or self.trainer.rollout is None:  # where all are at the same place
                self._save()  # a reward that fails costs nothing that was done before it
                self._say(f"saved; go on with --resume_from_checkpoint {self.folder}")
            raise
        return self._finish(before)

    def _load(self) -> None:
        config, rollout = self.config, self.config.rollout
        self._say(f"loading {config.model}")
        dtype = DTYPES[config.train.mixed_precision]
        self.model = SD3.load(
            config.model, dtype, self.accelerator.device, rollout.max_sequence_length, text_cache_folder(config)
        )
        self.model.latent_shape(rollout.height, rollout.width)  # an impossible size is said here, before the rest loads
        with self.accelerator.local_main_process_first():  # the others find its embeddings on disk
            scale = config.train.guidance_scale if rollout.guidance_scale == 1 else rollout.guidance_scale
            condition, negative = encode_prompts(self.model, self.plan.train, scale)
            test = encode_prompts(self.model, self.plan.test, config.eval.guidance_scale)
        again = last = condition.select(torch.tensor([-1]))
        if self.model.pipeline.text_encoder is not None:  # else all came from disk
            again = self.model.encode_anew([self.plan.train[-1].text])  # alone, not in the cache's batch
        alone, cached = again.embeds.float(), last.embeds.float()
        # bfloat16's rounding does less, another prompt's row is further
        if (alone - cached).norm() > 0.1 * alone.norm():
            raise UserError("the cached prompt embeddings differ from the text encoder's: nothing was trained")
        self.model.drop_text_encoders()  # before the reward loads: 10 GB less at once
        self.scorer = Scoring.load(config, self.accelerator.device)
        self.embedder = load_embedder(config, self.accelerator.device)
        options = config.train.gradient_checkpointing, self.sharded
        torch.manual_seed(config.seed)  # the LoRA's initial weights; everything else is seeded by name
        full = config.finetune == "full"
        self.policy = FullPolicy(self.model, *options) if full else Policy(self.model, config.lora, *options)
        if config.compile:
            shape = self.model.latent_shape(rollout.height, rollout.width)
            drawn = config.train.batch_size * config.train.sigmas_per_sample
            compile_blocks(self.policy, condition, shape, rollout.batch_size, drawn, rollout.fp8)
        cached = config.base_cache if self.accelerator.num_processes == 1 else None
        if config.base_cache and not cached:
            self._say("base_cache is for runs of one process: not used")
        self.base_cache = BaseCache(cached, config, self.plan.train, self.plan.test)
        collect = PairCollector if getattr(config.objective, "pairs_file", None) else Collector
        collector = collect(
            config, self.accelerator, self.model, self.policy, self.scorer, self.plan.train, condition, negative
        )
        self.trainer = Trainer(collector, self.base_cache)
        self.judge = Judge(collector, self.embedder, self.plan.test, test, self.folder)

    # one epoch

    def _epoch(self) -> None:
        started, epoch = time.monotonic(), self.trainer.epoch
        with tqdm(desc=f"epoch {epoch + 1}/{self.config.epochs}", disable=not self.main, dynamic_ncols=True) as bar:

            def progress(phase: str, done: int, total: int) -> None:
                if bar.total != total or done < bar.n:
                    bar.reset(total)
                bar.set_description(f"epoch {epoch + 1}/{self.config.epochs} {phase}", refresh=False)
                bar.update(done - bar.n)

            metrics, updates = self.trainer.run_epoch(progress)
            images, texts = self.trainer.last_images
            metrics |= sampled_accuracy(images, texts, self.accelerator)
            metrics |= sampled_diversity(images, texts, self.embedder or self.scorer.embedder)
            metrics["seconds"] = time.monotonic() - started + self.trainer.spared
            metrics["images_per_second"] = self.trainer.samples / metrics["seconds"]
            metrics |= {name: updates[-1][name] for name in DRIFTS if name in updates[-1]}
            shown = {k: f"{metrics[k]:.3f}" for k in self._shown(metrics)}
            bar.set_postfix(shown)
        self._log(epoch, metrics, updates)
        last = self.trainer.epoch == self.config.epochs
        if self.trainer.epoch % self.config.validation_epochs == 0 and not last:
            self.judge.grid(self.trainer.epoch)
        if self.config.evaluation_epochs and self.trainer.epoch % self.config.evaluation_epochs == 0 and not last:
            self.judge.on_the_way(self.trainer.epoch)
        if self.trainer.epoch % self.config.checkpointing_epochs == 0 or last:
            self._save()

    def _shown(self, metrics: dict[str, float]) -> list[str]:
        """What the bar shows: every score where there are several."""
        scores = list(self.scorer.scorers) if len(self.scorer.scorers) > 1 else []
        names = ["reward", *scores, "accuracy", "clip_diversity", "w2", "w2_old", "images_per_second"]
        return [name for name in names if name in metrics]

    def _log(self, epoch: int, metrics: dict[str, float], updates: list[dict[str, float]]) -> None:
        if not self.main:
            return
        step = epoch * self.config.train.inner_epochs * self.trainer.updates_per_pass
        rows = [{"kind": "update", "epoch": epoch, "step": step + n, **update} for n, update in enumerate(updates)]
        self._write(*rows, {"kind": "epoch", "epoch": epoch, **metrics})
        for number, update in enumerate(updates):
            self.accelerator.log({f"train/{name}": value for name, value in update.items()}, step + number)
        self.accelerator.log({f"epoch/{name}": value for name, value in metrics.items()}, step + len(updates))

    def _write(self, *records: dict[str, Any]) -> None:
        if self.main:
            log.append(self.folder / "metrics.jsonl", records)

    # saving

    def _save(self) -> None:
        state = self.trainer.state_dict()
        if self.main:
            folder = self.folder / "checkpoints"
            save_checkpoint(folder / f"epoch-{self.trainer.epoch:04d}", state)
            prune(folder, keep=2)

    def _start_trackers(self) -> None:
        if self.accelerator.log_with:
            options = {**_flat(asdict(self.config)), **self.scorer.units}
            self.accelerator.init_trackers("sd3_adrpo", config=options)

    def _finish(self, before: Measurement) -> dict[str, Any]:
        after = self.judge.after(self.trainer.epoch, before)
        summary = result.summarise(self, before, after)
        with self.policy.gathered():
            self.accelerator.end_training()  # nothing is left to do together
            if self.main:
                result.write(self, before, after, summary)
        return summary

    def seconds(self) -> float:
        return round(time.monotonic() - self.started, 1)

    def _say(self, text: str) -> None:
        if self.main:
            print(text, flush=True)


def _flat(options: dict[str, Any], prefix: str = "") -> dict[str, int | float | str | bool]:
    """Dotted names to values of the kinds that trackers take."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        nested = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return {name: value if isinstance(value, int | float | str | bool) else str(value) for name, value in flat.items()}
