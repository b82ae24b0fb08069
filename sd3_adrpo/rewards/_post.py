"""POST of JSON with time-outs and retries, over Python's own urllib."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from typing import Any

from ..errors import UserError

RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 529}  # statuses that a later attempt may not meet
LONGEST_WAIT = 60.0  # seconds


class Unanswered(UserError):
    """The server gave no usable answer to any attempt."""


def post_json(url: str, body: Any, key: str | None, timeout: float, retries: int, backoff: float) -> Any:
    """The JSON answer to `body`. `key` is sent as a bearer token, and not on to where the server may redirect.

    Waits `backoff` seconds before the first retry and twice as long before each next, or as long as the server's
    Retry-After says, at most a minute. Unanswered after the last one, or at once where a retry would not help.
    """
    data, reason = json.dumps(body).encode(), ""
    for attempt in range(retries + 1):
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method="POST")
        if key:
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        wait = backoff * 2**attempt
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            reason = f"status {error.code}: {_excerpt(error)}"
            if error.code not in RETRIED:
                raise Unanswered(f"{url} answers with {reason}{_remedy(error.code)}") from None
            wait = _retry_after(error) or wait
        except ValueError as error:  # of json
            reason = f"no JSON: {error}"
        except (OSError, http.client.HTTPException) as error:  # refused, reset, timed out, no such name
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        if attempt < retries:
            time.sleep(min(wait, LONGEST_WAIT))
    raise Unanswered(
        f"{url} gave no answer in {retries + 1} attempts of {timeout:g} s each; the last: {reason}. Check that it "
        "runs, or raise reward.timeout or reward.retries"
    )


def _excerpt(error: urllib.error.HTTPError) -> str:
    try:
        return error.read(300).decode("utf-8", "replace").strip()
    except OSError:
        return ""


def _retry_after(error: urllib.error.HTTPError) -> float | None:
    try:
        return float(error.headers.get("Retry-After", ""))
    except ValueError:  # absent, or a date
        return None


def _remedy(status: int) -> str:
    if status in (401, 403):
        return ". Put a valid key into the environment variable that reward.api_key_env names"
    if status == 404:
        return ". Check reward.url and reward.model"
    return ""
