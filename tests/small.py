"""A trainer of the built-in world whose epochs take a second, and what stops one between two updates."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from sd3_adrpo import cli, plan
from sd3_adrpo.optimizers import Optimization
from sd3_adrpo.run import Run
from sd3_adrpo.trainer import Trainer

OPTIONS = """--rollout.prompts_per_epoch 4 --rollout.samples_per_prompt 4 --rollout.num_inference_steps 3
    --rollout.batch_size 8 --train.batch_size 4 --train.gradient_accumulation_steps 2 --train.inner_epochs 2
    --train.sigmas_per_sample 2 --report_to none --lora.rank 4 --lora.alpha 4""".split()


def small_trainer(folder: Path, *options: str) -> Trainer:
    """Of 16 samples x 2 draws: 2 passes of 2 updates of 2 batches of 4 samples; sampled in 2 batches of 8."""
    folder.mkdir(exist_ok=True)
    (folder / "prompts.txt").write_text("a red circle\ntwo blue squares\na green heart\nan orange diamond\n")
    files = ["--prompts", str(folder / "prompts.txt"), "--output_dir", str(folder / "run")]
    config = cli.parse([*OPTIONS, *files, *options])
    run = Run(config, plan.check(config))
    run._load()
    return run.trainer


@contextmanager
def interrupted_after(updates: int) -> Iterator[None]:
    """SIGINT right behind this update of the runs inside."""
    step, done = Optimization.step, []

    def counted(self: Optimization) -> torch.Tensor:
        norm = step(self)
        done.append(norm)
        if len(done) == updates:
            signal.raise_signal(signal.SIGINT)
        return norm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Optimization, "step", counted)
        yield
