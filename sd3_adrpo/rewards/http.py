"""A reward that runs elsewhere: behind a URL, in another environment or on another computer (eval/reward_server.py).

The protocol is in rewards/_protocol.py and docs/rewards.md.
"""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar
from urllib.parse import urlsplit

from ..errors import RewardError, UserError
from ..prompts import Prompt

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")
LONGEST_WAIT = 30.0  # seconds between two tries
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass
class HttpReward:
    """Scores from a server: JSON with PNG images, or npz, over HTTP."""

    name: Literal["http"] = "http"
    url: str | None = None  # such as http://127.0.0.1:8000
    body: Literal["png", "npz"] = "png"  # how images travel: base64 PNG in JSON, or a compressed npz
    batch_size: int = 16  # images per request
    timeout: float = 60.0  # seconds without an answer after which a request has failed
    retries: int = 5  # of a failed request, after 1, 2, 4, ... seconds
    token_variable: str | None = None  # environment variable with the bearer token that the server asks for

    def describe(self) -> str:
        """UserError for a missing or odd URL, a token that is not there, or numbers that cannot be. Asks no server."""
        parts = urlsplit(self.url or "")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"the http reward's url is {self.url!r}; it must be like http://127.0.0.1:8000")
        if parts.username is not None:
            raise UserError("the http reward's url holds a user name: put the secret into a token_variable instead")
        if self.batch_size < 1 or self.retries < 0 or not self.timeout > 0:
            raise UserError("the http reward needs batch_size of at least 1, retries of at least 0, a positive timeout")
        self.token()
        return f"scores from {self.url}"

    def token(self) -> str | None:
        if self.token_variable is None:
            return None
        if not os.environ.get(self.token_variable):
            raise UserError(f"the http reward's token_variable is {self.token_variable}, which is not set: export it")
        return os.environ[self.token_variable]

    def load(self, device: str | torch.device = "cpu") -> HttpScorer:
        """Asks the server who it is. RewardError where none answers."""
        self.describe()
        return HttpScorer(self)


class _Refused(Exception):
    """The server understood and said no: asking again does not help."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Neither the images nor the token go to a host that the user has not named."""

    def redirect_request(self, *_: object) -> None:
        return None


class HttpScorer:
    """Requests of `batch_size` images, one after the other; each is tried again by itself."""

    def __init__(self, config: HttpReward, sleep: Callable[[float], None] = time.sleep) -> None:
        self.config, self.sleep = config, sleep
        handlers: list[urllib.request.BaseHandler] = [_NoRedirect()]
        if urlsplit(config.url).hostname in LOOPBACK:  # a proxy of the environment cannot reach it
            handlers.append(urllib.request.ProxyHandler({}))
        self.opener = urllib.request.build_opener(*handlers)
        known = self._persistent(self._who)
        self.unit, self.encoder = str(known.get("unit", "the server's unit")), str(known.get("encoder", config.url))

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Rewards (B,) of images (B, 3, H, W) in [0, 1], or uint8. RewardError names the URL and the last cause."""
        import torch

        from ._protocol import decode_scores, encode_request

        parts = []
        for start in range(0, len(prompts), self.config.batch_size):
            rows = slice(start, start + self.config.batch_size)
            data, kind = encode_request(images[rows], prompts[rows], self.config.body)
            count = len(prompts[rows])
            parts.append(
                self._persistent(lambda data=data, kind=kind, n=count: decode_scores(self._request(data, kind), n))
            )
        return torch.cat(parts) if parts else torch.zeros(0)

    def _who(self) -> dict:
        """The server's unit and encoder; {} from one that only takes POST requests."""
        try:
            known = json.loads(self._request())
        except (_Refused, ValueError):
            return {}
        return known if isinstance(known, dict) else {}

    def _request(self, data: bytes | None = None, kind: str | None = None) -> bytes:
        """The body of the answer to a POST of `data`, or to a GET."""
        headers = {"Accept": "application/json"} | ({"Content-Type": kind} if kind else {})
        token = self.config.token()
        headers |= {"Authorization": f"Bearer {token}"} if token else {}
        request = urllib.request.Request(self.config.url, data, headers)
        try:
            with self.opener.open(request, timeout=self.config.timeout) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            cause = f"HTTP {error.code}: {error.read(500).decode(errors='replace') or error.reason}"
            if error.code in (401, 403):  # also of a GET: better said before the first image
                raise RewardError(f"the reward server at {self.config.url} wants another token ({cause})") from None
            if error.code < 500 and error.code not in (408, 425, 429):
                raise _Refused(cause) from None
            raise OSError(cause) from None

    def _persistent(self, action: Callable[[], T]) -> T:
        """The action's result, tried again while the server does not answer or answers nonsense."""
        retries = self.config.retries
        for attempt in range(retries + 1):
            try:
                return action()
            except _Refused as error:
                raise RewardError(f"the reward server at {self.config.url} refused: {error}") from None
            except (OSError, http.client.HTTPException, ValueError) as error:  # URLError and time-outs are OSErrors
                cause = str(getattr(error, "reason", None) or error) or type(error).__name__
            if attempt < retries:
                wait = min(2.0**attempt, LONGEST_WAIT)
                warnings.warn(f"the reward server at {self.config.url}: {cause}; again in {wait:g} s", stacklevel=3)
                self.sleep(wait)
        raise RewardError(
            f"the reward server at {self.config.url} gave no scores in {retries + 1} tries, the last time: {cause}. "
            "Start the server; a run that had begun goes on with --resume_from_checkpoint. If the server only needs "
            "longer, raise the http reward's retries or timeout"
        )
