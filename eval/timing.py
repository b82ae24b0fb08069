"""What a benchmark needs of a clock: fair comparisons, where the time goes, how much memory it takes."""

from __future__ import annotations

import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psutil
import torch


class Clock:
    """Seconds: on a GPU those of the wall, with its queue empty; on a CPU those that this process computed.

    Processor seconds do not count what other programs take meanwhile, so ratios survive on a busy computer.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def __call__(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def compare(self, actions: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
        """Median seconds of each action. They take turns, so that what changes meanwhile changes for all; a round of
        warming up does not count."""
        seconds: dict[str, list[float]] = {name: [] for name in actions}
        for turn in range(repeats + 1):
            for name, action in actions.items():
                start = self()
                action()
                if turn:
                    seconds[name].append(self() - start)
        return {name: statistics.median(values) for name, values in seconds.items()}


class Breakdown:
    """Seconds by name, of methods that it wraps; what runs within another counts for the inner one only."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.seconds, self._running = clock, defaultdict(float), []

    @contextmanager
    def watching(self, *watched: tuple[Any, str, str]) -> Iterator[None]:
        """(object, method, name): "{}" in a name is the name around it."""
        originals = [(owner, method, owner.__dict__.get(method)) for owner, method, _ in watched]
        for owner, method, name in watched:
            setattr(owner, method, self._timed(getattr(owner, method), name))
        try:
            yield
        finally:
            for owner, method, original in originals:
                if original is None:
                    delattr(owner, method)
                else:
                    setattr(owner, method, original)

    def _timed(self, function: Callable, name: str) -> Callable:
        def call(*args: Any, **options: Any) -> Any:
            own = name.format(self._running[-1][0] if self._running else "")
            start = self.clock()
            self._running.append([own, 0.0])
            try:
                return function(*args, **options)
            finally:
                total = self.clock() - start
                self.seconds[own] += total - self._running.pop()[1]
                if self._running:
                    self._running[-1][1] += total

        return call


class PeakMemory:
    """Bytes at the highest point within a `with`: of the GPU's allocator, or the process's resident set on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.cuda, self.bytes = device.type == "cuda", 0

    def __enter__(self) -> PeakMemory:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            self._done = threading.Event()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._done.wait(0.005):
            self.bytes = max(self.bytes, process.memory_info().rss)

    def __exit__(self, *_: Any) -> None:
        if self.cuda:
            self.bytes = torch.cuda.max_memory_allocated()
        else:
            self._done.set()
            self._thread.join()
            self.bytes = max(self.bytes, psutil.Process().memory_info().rss)


def matrix_peak(device: torch.device, dtype: torch.dtype, size: int, clock: Clock) -> float:
    """FLOP per second of a square matrix product, the most that a model of such products can get here."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = 10 if clock.cuda else 3

    def products() -> None:
        for _ in range(times):
            a @ b

    return 2 * size**3 * times / clock.compare({"product": products}, 5)["product"]
