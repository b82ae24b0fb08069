"""The http reward against servers that misbehave, and against eval/reward_server.py in a process of its own."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from sd3_adrpo.errors import RewardError, UserError
from sd3_adrpo.prompts import Prompt
from sd3_adrpo.rewards import _protocol
from sd3_adrpo.rewards.http import HttpReward, HttpScorer
from sd3_adrpo.rewards.jpeg import JpegReward

ROOT = Path(__file__).parent.parent
IMAGES = torch.randint(0, 256, (5, 3, 16, 24), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
PROMPTS = [Prompt(f"café {i}", "c", None, {"text": "x"} if i else None) for i in range(5)]
pytestmark = pytest.mark.filterwarnings("ignore:the reward server")


@contextmanager
def server(answer: Callable[[int, dict], tuple[int, bytes] | None]) -> Iterator[tuple[str, list[dict]]]:
    """Answers the n-th POST with `answer(n, request)`: status and body, or None to hang up. GET says nothing."""
    seen: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(405)

        def do_POST(self):
            data = self.rfile.read(int(self.headers["Content-Length"]))
            images, prompts = _protocol.decode_request(data, self.headers["Content-Type"])
            seen.append({"images": images, "prompts": prompts, "token": self.headers.get("Authorization")})
            found = answer(len(seen), seen[-1])
            if found is not None:
                self.send_response(found[0])
                self.end_headers()
                self.wfile.write(found[1])

        def log_message(self, *_):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.daemon_threads = True
    threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{running.server_address[1]}", seen
    finally:
        running.shutdown()
        running.server_close()


def brightness(_: int, request: dict) -> tuple[int, bytes]:
    return 200, json.dumps({"scores": request["images"].float().mean((1, 2, 3)).tolist()}).encode()


@pytest.mark.parametrize("body", ["png", "npz"])
def test_images_and_prompts_arrive_as_they_are_in_batches(body):
    with server(brightness) as (url, seen):
        scorer = HttpReward(url=url, body=body, batch_size=2).load()
        scores = scorer(IMAGES, PROMPTS)
    assert torch.allclose(scores, IMAGES.float().mean((1, 2, 3)))
    assert [len(request["images"]) for request in seen] == [2, 2, 1]
    assert torch.equal(torch.cat([request["images"] for request in seen]), IMAGES)
    assert [prompt for request in seen for prompt in request["prompts"]] == PROMPTS
    assert seen[1]["prompts"][0].metadata == {"text": "x"}


FAULTS = {
    "500": (500, b"out of memory"),
    "503": (503, b""),
    "429": (429, b"slower"),
    "not JSON": (200, b"<html>"),
    "no scores": (200, b'{"score": [1]}'),
    "wrong length": (200, b'{"scores": [1.0]}'),
    "not numbers": (200, b'{"scores": ["a", "b", "c", "d", "e"]}'),
    "null": (200, b'{"scores": [null, 1, 1, 1, 1]}'),
    "hangs up": None,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_that_pass_are_waited_for(fault):
    waits: list[float] = []
    with server(lambda n, request: FAULTS[fault] if n <= 3 else brightness(n, request)) as (url, seen):
        scorer = HttpScorer(HttpReward(url=url), waits.append)
        assert torch.allclose(scorer(IMAGES, PROMPTS), IMAGES.float().mean((1, 2, 3)))
    assert len(seen) == 4 and waits == [1.0, 2.0, 4.0]


@pytest.mark.parametrize(
    ("fault", "cause"),
    [("500", "HTTP 500: out of memory"), ("wrong length", "1 scores came for 5 images"), ("not JSON", "not JSON")],
)
def test_faults_that_stay_name_url_and_cause(fault, cause):
    waits: list[float] = []
    with server(lambda *_: FAULTS[fault]) as (url, seen):
        with pytest.raises(RewardError) as caught:
            HttpScorer(HttpReward(url=url, retries=7), waits.append)(IMAGES, PROMPTS)
    assert url in str(caught.value) and cause in str(caught.value) and "8 tries" in str(caught.value)
    assert len(seen) == 8 and waits == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


def test_a_slow_server_is_asked_again():
    def answer(n: int, request: dict) -> tuple[int, bytes]:
        time.sleep(2.0 if n == 1 else 0)
        return brightness(n, request)

    waits: list[float] = []
    with server(answer) as (url, seen):
        scorer = HttpScorer(HttpReward(url=url, timeout=5.0), waits.append)
        scorer.config.timeout = 0.5
        for _ in range(20):  # a loaded computer may take longer than that for a good answer
            try:
                assert scorer(IMAGES[:1], PROMPTS[:1]).shape == (1,)
                break
            except RewardError:
                scorer.config.timeout = 5.0
    assert len(seen) >= 2 and waits[0] == 1.0


def test_a_dead_server_is_named():
    with server(brightness) as (url, _):
        scorer = HttpScorer(HttpReward(url=url, retries=1), lambda _: None)
    with pytest.raises(RewardError, match=f"{url} gave no scores in 2 tries, .*refused"):
        scorer(IMAGES, PROMPTS)


def test_refusals_are_not_repeated():
    for status, message in ((400, "refused: HTTP 400: bad"), (302, "refused: HTTP 302"), (401, "wants another token")):
        with server(lambda *_, status=status: (status, b"bad")) as (url, seen):
            with pytest.raises(RewardError, match=message):
                HttpScorer(HttpReward(url=url), lambda _: None)(IMAGES, PROMPTS)
        assert len(seen) == 1


def test_the_token_is_sent_and_must_be_there(monkeypatch):
    with server(brightness) as (url, seen):
        config = HttpReward(url=url, token_variable="A_REWARD_TOKEN")
        monkeypatch.delenv("A_REWARD_TOKEN", raising=False)
        with pytest.raises(UserError, match="A_REWARD_TOKEN, which is not set"):
            config.describe()
        monkeypatch.setenv("A_REWARD_TOKEN", "secret")
        config.load()(IMAGES[:1], PROMPTS[:1])
    assert seen[0]["token"] == "Bearer secret"


@pytest.mark.parametrize("url", [None, "127.0.0.1:8000", "ftp://a/b", "http://", "http://user:pass@host/"])
def test_urls_that_cannot_be(url):
    with pytest.raises(UserError, match="the http reward's url"):
        HttpReward(url=url).describe()


def test_bodies_that_are_not_of_the_protocol():
    good, kind = _protocol.encode_request(IMAGES[:1], PROMPTS[:1])
    pickled = io.BytesIO()
    np.savez(pickled, images=np.array([{"a": 1}], dtype=object), prompts=np.array("[]"), allow_pickle=True)
    content = json.loads(good)
    for body, sort in [
        (b"", kind),
        (b"[]", kind),
        (b"\x80\x04.", kind),
        (b"PK\x03\x04", _protocol.NPZ),
        (pickled.getvalue(), _protocol.NPZ),
        (json.dumps({**content, "images": ["!!"]}).encode(), kind),
        (json.dumps({**content, "images": []}).encode(), kind),
        (json.dumps({**content, "prompts": [{"prompt": "a"}]}).encode(), kind),
    ]:
        with pytest.raises(_protocol.ProtocolError):
            _protocol.decode_request(body, sort)
    plain = json.dumps({**content, "prompts": ["a cat"]}).encode()
    assert _protocol.decode_request(plain, "application/json; charset=utf-8")[1] == [Prompt("a cat")]


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("reward_server_script", ROOT / "eval" / "reward_server.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_server_keeps_strangers_out(script, capsys, monkeypatch):
    assert script.main(["--host", "0.0.0.0", "--reward", "jpeg"]) == 1
    assert "needs a --token_variable" in capsys.readouterr().err
    assert script.main(["--port", "99999", "--reward", "jpeg"]) == 1
    assert "cannot listen on 127.0.0.1:99999" in capsys.readouterr().err
    monkeypatch.setenv("A_REWARD_TOKEN", "secret")
    from sd3_adrpo.scoring import Scoring

    running = script.RewardServer(("127.0.0.1", 0), Scoring({"jpeg": JpegReward().load()}), "secret", max_mb=0.001)
    threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        with pytest.raises(RewardError, match="wants another token"):
            HttpReward(url=running.url).load()
        scorer = HttpReward(url=running.url, token_variable="A_REWARD_TOKEN").load()
        with pytest.raises(RewardError, match="HTTP 413: .*at most 1000: send fewer"):
            scorer(IMAGES, PROMPTS)
        running.max_bytes = 10**6
        running.scoring = Scoring({"bad": lambda *_: torch.tensor([float("nan")] * 5)})
        scorer.config.retries = 0
        with pytest.raises(RewardError, match="HTTP 500: .*the reward bad is nan"):
            scorer(IMAGES, PROMPTS)
    finally:
        running.shutdown()
        running.server_close()


def test_server_and_client_in_two_processes():
    command = [sys.executable, "eval/reward_server.py", "--port", "0", "--reward", "jpeg", "--device", "cpu"]
    environment = {**__import__("os").environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            said = process.stdout.readline()
            assert said.startswith("serving -kB, JPEG of quality 95 on http://127.0.0.1:")
            for body in ("png", "npz"):
                scorer = HttpReward(url=said.split()[-1], body=body, batch_size=3).load()
                assert (scorer.unit, scorer.encoder) == ("-kB", "JPEG of quality 95")
                assert torch.allclose(scorer(IMAGES, PROMPTS), JpegReward().load()(IMAGES, PROMPTS))
        finally:
            process.kill()
    with pytest.raises(RewardError, match="gave no scores in 2 tries"):
        scorer.config.retries, scorer.sleep = 1, lambda _: None
        scorer(IMAGES, PROMPTS)
