"""Several processes as one: who samples what, the rows of all of them together, and errors that end them together.

Every process holds the whole epoch's latents and rewards (0.1 GB for 384 images of 512 px), so an update takes its
samples from all of them and the number of processes changes neither the advantages nor the update, only rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object
from torch import Tensor

from .config import Config
from .errors import UserError

ALONE = SimpleNamespace(num_processes=1, process_index=0, is_main_process=True)  # for programs of one process
AT_ONCE = 2**28  # bytes that one message brings to the device; the rows of all processes need not fit there


def share(total: int, accelerator: Accelerator) -> slice:
    """This process's part of `total` rows in order; the parts differ by at most one row."""
    processes, process = accelerator.num_processes, accelerator.process_index
    return slice(process * total // processes, (process + 1) * total // processes)


def gather_rows(values: Tensor, total: int, accelerator: Accelerator) -> Tensor:
    """(total, ...) on the CPU from each process's `share` of it: the parts may differ in length."""
    processes = accelerator.num_processes
    if processes == 1:
        return values.cpu()
    longest = -(-total // processes)
    padded = values.new_zeros(longest, *values.shape[1:])
    padded[: len(values)] = values
    rows = max(1, AT_ONCE // (processes * max(1, padded[:1].nbytes)))
    gathered = [accelerator.gather(part.to(accelerator.device)).cpu() for part in padded.split(rows)]
    together = torch.cat([part.unflatten(0, (processes, -1)) for part in gathered], dim=1)
    lengths = [(p + 1) * total // processes - p * total // processes for p in range(processes)]
    return torch.cat([part[:length] for part, length in zip(together, lengths, strict=True)])


def sum_gradients(parameters: list[torch.nn.Parameter], accelerator: Accelerator) -> None:
    """Over the processes, in messages of up to AT_ONCE bytes instead of DDP's buckets: a LoRA's is one message."""
    if accelerator.num_processes == 1:
        return
    buckets: list[list[torch.nn.Parameter]] = [[]]
    for parameter in parameters:
        if sum(p.grad.nbytes for p in buckets[-1]) + parameter.grad.nbytes > AT_ONCE and buckets[-1]:
            buckets.append([])
        buckets[-1].append(parameter)
    for bucket in filter(None, buckets):
        flat = accelerator.reduce(torch.cat([p.grad.flatten() for p in bucket]), "sum")
        for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            parameter.grad.copy_(part.view_as(parameter))


def any_process(flag: bool, accelerator: Accelerator) -> bool:
    """Whether `flag` is set on any process; the same answer on all."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum").item())


def patience(config: Config) -> InitProcessGroupKwargs:
    """How long processes wait for each other: for a reward's retries, and for a checkpoint on a slow disk.

    NCCL's own limit of ten minutes would end them while one still waits for its reward's answer.
    """
    return InitProcessGroupKwargs(timeout=timedelta(seconds=7200 + config.reward_timeout * (config.reward_retries + 1)))


@contextmanager
def failing_together(accelerator: Accelerator) -> Iterator[None]:
    """An error of one process within ends all after it, instead of leaving the others waiting for its rows.

    Process 0 raises the message, as a UserError when the cause was one; the others exit with 1.
    """
    if accelerator.num_processes == 1:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    number, mine = accelerator.process_index, isinstance(error, UserError)
    failed = [(number, mine, str(error) if mine else f"{type(error).__name__}: {error}")] if error else []
    failures = gather_object(failed)
    if not failures:
        return
    if not accelerator.is_main_process:
        raise SystemExit(1) from error
    number, expected, message = failures[0]
    more = f" ({len(failures)} of {accelerator.num_processes} processes failed)" if len(failures) > 1 else ""
    kind = UserError if expected else RuntimeError
    raise kind(f"process {number}: {message}{more}") from error
