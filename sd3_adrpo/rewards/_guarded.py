"""A reward's call, made safe: a time limit, another try where that may help, and scores that are usable or an error."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import RewardError, UserError
from ..prompts import Prompt

OWN_MISTAKES = (TypeError, NameError, AttributeError, ImportError, NotImplementedError)  # no second try mends them


def guarded(
    call: Callable[[], Tensor], name: str, prompts: Sequence[Prompt], timeout: float = 600, retries: int = 2
) -> Tensor:
    """Rewards (B,) float32 on the CPU. RewardError names the reward, the cause and the prompts.

    An exception is tried again `retries` times, after 1 s, 2 s, 4 s: it may come from a network or a full memory. A
    call that does not return within `timeout` seconds (0: no limit) is not: its thread cannot be ended and may still
    hold what another call needs.
    """
    for attempt in range(retries + 1):
        try:
            return _usable(_in_time(call, timeout), name, prompts)
        except UserError:
            raise
        except _Hangs:
            raise RewardError(
                f"the reward {name} has not returned within {timeout:g} s for {_named(prompts)}. If it only needs "
                "longer, raise reward_timeout (0: no limit); else look at what it waits for"
            ) from None
        except Exception as error:
            cause = f"{type(error).__name__}: {error}"
            if attempt == retries or isinstance(error, OWN_MISTAKES):
                tried = f" {attempt + 1} times" if attempt else ""
                raise RewardError(f"the reward {name} failed{tried} for {_named(prompts)}: {cause}") from error
            warnings.warn(f"the reward {name} failed ({cause}); trying again in {2**attempt} s", stacklevel=2)
            time.sleep(2**attempt)
    raise AssertionError("unreachable")


class _Hangs(Exception):
    pass


def _in_time(call: Callable[[], Any], timeout: float) -> Any:
    """The call's result. It runs in a thread of its own, a daemon, so that the program can end while it hangs."""
    if not timeout:
        with torch.no_grad():
            return call()
    outcome: list[tuple[bool, Any]] = []

    def run() -> None:
        try:
            with torch.no_grad():  # a setting of each thread
                outcome.append((True, call()))
        except BaseException as error:
            outcome.append((False, error))

    thread = threading.Thread(target=run, daemon=True, name="reward")
    thread.start()
    thread.join(timeout)
    if not outcome:
        raise _Hangs
    succeeded, value = outcome[0]
    if succeeded:
        return value
    raise value


def _usable(scores: Any, name: str, prompts: Sequence[Prompt]) -> Tensor:
    if not isinstance(scores, Tensor) or scores.shape != (len(prompts),):
        found = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
        raise RewardError(
            f"the reward {name} gave {found} for {_named(prompts)}; it must be one number per image, shape "
            f"({len(prompts)},)"
        )
    scores = scores.detach().to("cpu", torch.float32)
    bad = (~scores.isfinite()).nonzero().flatten().tolist()
    if bad:
        named = _named([prompts[row] for row in bad])
        raise RewardError(
            f"the reward {name} is {scores[bad[0]].item()} for {len(bad)} of {len(scores)} images, with {named}: it "
            "must be finite. If the images are broken, lower train.learning_rate or take mixed_precision bf16 or no"
        )
    return scores


def _named(prompts: Sequence[Prompt]) -> str:
    """`the prompts 'a', 'b', 'c' and 4 more`."""
    names = list(dict.fromkeys(repr(prompt.text) for prompt in prompts))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"the prompt{'s' if len(names) > 1 else ''} {', '.join(names[:3])}{more}"
