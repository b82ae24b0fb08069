"""Errors that the user can act on: train_sd3.py prints their message alone, without a traceback, and exits with 1."""

from __future__ import annotations


class UserError(Exception):
    """Something about the input, the machine or the run's state. The message states what it found, what is allowed
    and the remedy."""


class RewardError(UserError):
    """A reward that gave no usable scores; the message names the reward and the prompts."""
