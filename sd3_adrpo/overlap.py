"""Work on one item while the next is made: rewards of a batch beside the sampling of the next one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def worked_on(items: Iterable[Item], work: Callable[[Item], Result], beside: bool = True) -> Iterator[Result]:
    """`map(work, items)`; with `beside`, each call runs on a second thread while the next item is made.

    One call at a time, in order; no more than two items are alive. An error of `work` is raised where its result would
    have come. When the making of items ends in an error or a stop, the result that is due comes first.
    """
    if not beside:
        yield from map(work, items)
        return
    items, pending, ended = iter(items), None, None
    with ThreadPoolExecutor(1, "beside") as thread:
        while ended is None:
            try:
                item = next(items)
            except BaseException as error:  # StopIteration among them
                ended = error
            if pending is not None:
                yield pending.result()
            pending: Future | None = thread.submit(work, item) if ended is None else None
    if not isinstance(ended, StopIteration):
        raise ended
