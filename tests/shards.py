"""Full fine-tuning on 1 and 2 CPU processes, and with FSDP2 shards, for test_sharding.py: `python shards.py FOLDER`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from processes import on_processes, train

# diffusion_nft samples with averaged weights, adrpo (the LoRA's) needs the reference
FULL = ("--finetune", "full", "--train.learning_rate", "1e-4", "--objective", "diffusion_nft")
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}


def main(root: Path) -> None:
    torch.set_num_threads(1)
    (root / "prompts.txt").write_text("a red circle\ntwo blue squares\na green heart above a pink cross\n")
    codes = {}

    def start(name: str, processes: int, *arguments: str, **environment: str) -> None:
        def action() -> None:
            os.environ.update(environment)
            train(root / name, processes, *arguments)

        codes[name] = on_processes(processes, action)

    def move(source: str, name: str) -> tuple[str, str]:
        """The checkpoint of the first epoch, to go on with in another folder."""
        (root / name / "checkpoints").mkdir(parents=True)
        (root / source / "checkpoints" / "epoch-0001").rename(root / name / "checkpoints" / "epoch-0001")
        return "--resume_from_checkpoint", str(root / name)

    start("full1", 1, *FULL)
    start("full2", 2, *FULL)
    start("shards2", 2, *FULL, **FSDP)
    start("resumed1", 1, *FULL, *move("shards2", "resumed1"))
    start("resumed2", 2, *FULL, *move("full1", "resumed2"), **FSDP, FSDP_RESHARD_AFTER_FORWARD="false")
    start("lora1", 1)
    start("lora2", 2, **FSDP)
    print(f"codes {codes}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
