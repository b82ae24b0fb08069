"""Runs the same small training on 1, 2 and 4 CPU processes, for test_parallel.py: `python processes.py FOLDER`.

The libraries are imported once; every process is a fork, which must come before the first backward pass.
"""

from __future__ import annotations

import os
import socket
import sys
import traceback
from pathlib import Path

import torch

from sd3_adrpo import cli, plan
from sd3_adrpo.errors import UserError
from sd3_adrpo.rewards.clip import ClipScorer, RewardError
from sd3_adrpo.run import Run
from sd3_adrpo.trainer import Trainer

# 18 images: 4 processes sample 4, 5, 4 and 5 of them, and share updates of 9
SMALL = """--rollout.prompts_per_epoch 3 --rollout.samples_per_prompt 6 --rollout.num_inference_steps 2
    --rollout.batch_size 8 --train.gradient_accumulation_steps 1 --train.inner_epochs 1 --train.sigmas_per_sample 2
    --train.learning_rate 1e-3 --eval.samples_per_prompt 2 --eval.num_inference_steps 1 --checkpointing_epochs 1
    --validation_epochs 9 --epochs 2 --report_to none --lora.rank 2 --lora.alpha 2""".split()
GLOBAL_BATCH = 12


def train(folder: Path, processes: int, *arguments: str) -> None:
    prompts = folder.parent / "prompts.txt"
    options = [*SMALL, "--prompts", str(prompts), "--train.batch_size", str(GLOBAL_BATCH // processes), *arguments]
    config = cli.parse([*options, "--output_dir", str(folder)])
    Run(config, plan.check(config))()


def keep_samples(folder: Path) -> None:
    """Writes what each epoch trained on, once per process."""
    update_pass = Trainer._update_pass

    def kept(self: Trainer, progress):
        name = f"{folder.name}-epoch{self.epoch}-process{self.accelerator.process_index}.pt"
        seen = {"clean": self.rollout.clean, "rewards": self.rollout.rewards, "advantage": self.advantage}
        torch.save({**seen, "updates": self.updates_per_pass}, folder.parent / name)
        return update_pass(self, progress)

    Trainer._update_pass = kept


def break_reward(self: ClipScorer, images, prompts):
    """Of the second process, in its third call."""
    ClipScorer.calls = getattr(ClipScorer, "calls", 0) + 1
    if os.environ["RANK"] == "1" and ClipScorer.calls > 3:
        raise RewardError("the reward is nan for 1 of 9 images")
    return score(self, images, prompts)


score = ClipScorer.__call__


def on_processes(number: int, action) -> list[int]:
    """Exit codes of `action` in so many forks, which find each other as under torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(number):
        child = os.fork()
        if child == 0:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
            names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
            os.environ.update({name: str(value) for name, value in names.items()})
            code = 70
            try:
                action()
                code = 0
            except UserError as error:
                print(f"UserError: {error}", flush=True)
                code = 1
            except SystemExit as stop:
                code = int(stop.code)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def main(root: Path) -> None:
    torch.set_num_threads(1)
    (root / "prompts.txt").write_text("a red circle\ntwo blue squares\na green heart above a pink cross\n")

    def whole(processes: int):
        folder = root / f"on{processes}"
        return lambda: (keep_samples(folder), train(folder, processes))

    def broken():
        ClipScorer.__call__ = break_reward
        train(root / "broken", 2)

    codes = {f"on{processes}": on_processes(processes, whole(processes)) for processes in (1, 2, 4)}
    first = root / "on2" / "checkpoints" / "epoch-0001"
    (root / "resumed" / "checkpoints").mkdir(parents=True)
    first.rename(root / "resumed" / "checkpoints" / "epoch-0001")
    again = ["--resume_from_checkpoint", str(root / "resumed")]
    codes["resumed"] = on_processes(1, lambda: train(root / "resumed", 1, *again))
    codes["broken"] = on_processes(2, broken)
    print(f"codes {codes}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
