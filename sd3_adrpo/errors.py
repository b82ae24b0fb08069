"""Errors that the user can act on, and how a program ends with one: its name and the message, without a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


class UserError(Exception):
    """Something about the input, the machine or the run's state. The message states what it found, what is allowed
    and the remedy."""


class RewardError(UserError):
    """A reward that gave no usable scores; the message names the reward and the prompts."""


class OptionError(Exception):
    """An option that is misspelt or ill-typed: programs exit with 2, as argparse does."""


def exit_code(
    program: str, action: Callable[[], Any], mendable: type[Exception] | tuple[type[Exception], ...] = UserError
) -> int:
    """Calls `action`. 0: it is done; 1: it raised what the user can mend, whose message is printed to stderr."""
    try:
        action()
    except mendable as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 1
    return 0
