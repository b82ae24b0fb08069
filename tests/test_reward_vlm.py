"""The vlm reward against a server of our own on this machine, as good and as bad as real ones."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image
from published import PROMPTS, images

from sd3_adrpo.rewards.clip import RewardError, quantise
from sd3_adrpo.rewards.vlm import VlmReward


def says(text: str) -> dict:
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


@pytest.fixture
def server():
    """`server.answer(body, count)` gives (status, headers, bytes or JSON) for the request number `count`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                server.seen.append((self.path, dict(self.headers), body))
                count = len(server.seen)
            status, headers, answer = server.answer(body, count)
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            try:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)
            except OSError:  # the client has given up waiting
                pass

        def do_GET(self):
            server.redirected.append(dict(self.headers))
            self.send_error(404)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.lock, server.seen, server.redirected = threading.Lock(), [], []
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def _scorer(server, **options):
    return VlmReward(url=server.url, **{"backoff": 0.01, "retries": 2, "timeout": 5.0, "model": "m"} | options).load()


def _question(body: dict) -> str:
    return body["messages"][0]["content"][0]["text"]


def test_rates_each_image_with_its_own_prompt(server, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    batch = quantise(images(8))

    def answer(body, _):
        link = body["messages"][0]["content"][1]["image_url"]["url"]
        assert link.startswith("data:image/png;base64,")
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(link.partition(",")[2]))))
        row = next(i for i in range(3) if np.array_equal(picture, batch[i].permute(1, 2, 0).numpy()))
        assert PROMPTS[row].text in _question(body)
        return 200, {}, says(f"I rate it {row + 1.5} of it all: {row + 1.5}")

    server.answer = answer
    scorer = _scorer(server, api_key_env="MY_KEY")
    rewards = scorer(batch, PROMPTS)
    assert rewards.tolist() == [1.5, 2.5, 3.5] and rewards.dtype == torch.float32
    path, headers, body = server.seen[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert body["model"] == "m" and body["temperature"] == 0.0
    assert "secret" not in repr(scorer) and scorer.unit == "rating, 0 to 10"


def test_without_a_key_none_is_sent(server, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server.answer = lambda body, count: (200, {}, says("4"))
    assert _scorer(server)(images(8), PROMPTS).tolist() == [4, 4, 4]
    assert all("Authorization" not in headers for _, headers, _ in server.seen)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_passing_faults_are_retried(server, status):
    server.answer = lambda body, count: (status, {}, b"busy") if count <= 2 else (200, {}, says("7"))
    assert _scorer(server, concurrency=1)(images(8), PROMPTS).tolist() == [7, 7, 7]
    assert len(server.seen) == 5


def test_answers_that_are_no_json_are_retried(server):
    server.answer = lambda body, count: (200, {}, b"<html>" if count == 1 else says("7"))
    assert _scorer(server, concurrency=1)(images(8), PROMPTS).tolist() == [7, 7, 7]
    assert len(server.seen) == 4


def test_waits_longer_each_time_and_as_long_as_the_server_asks(server, monkeypatch):
    waits = []
    monkeypatch.setattr("sd3_adrpo.rewards._post.time.sleep", waits.append)
    server.answer = lambda body, count: (503, {"Retry-After": "7"} if count == 3 else {}, b"")
    with pytest.raises(RewardError, match="no answer in 4 attempts.*status 503"):
        _scorer(server, retries=3, backoff=0.5)(images(8, count=1), PROMPTS[:1])
    assert waits == [0.5, 1.0, 7.0]


def test_a_slow_server_runs_into_the_time_out(server):
    server.answer = lambda body, count: time.sleep(1.0) or (200, {}, says("7"))
    start = time.monotonic()
    with pytest.raises(RewardError, match="no answer in 2 attempts of 0.2 s.*timed out"):
        _scorer(server, timeout=0.2, retries=1)(images(8, count=1), PROMPTS[:1])
    assert time.monotonic() - start < 1.0 + 2.0


def test_no_server_says_so():
    scorer = VlmReward(url="http://127.0.0.1:9/v1", retries=1, backoff=0).load()
    with pytest.raises(RewardError, match="127.0.0.1:9.*2 attempts.*refused.*resumed"):
        scorer(images(8, count=1), PROMPTS[:1])


def test_a_wrong_key_is_not_retried(server):
    server.answer = lambda body, count: (401, {}, b"invalid key")
    with pytest.raises(RewardError, match="status 401: invalid key.*reward.api_key_env"):
        _scorer(server, concurrency=1)(images(8, count=1), PROMPTS[:1])
    assert len(server.seen) == 1


def test_the_key_does_not_follow_a_redirect(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server.answer = lambda body, count: (302, {"Location": server.url + "/elsewhere"}, b"")
    with pytest.raises(RewardError):
        _scorer(server, retries=0)(images(8, count=1), PROMPTS[:1])
    assert server.seen[0][1]["Authorization"] == "Bearer secret"
    assert len(server.redirected) == 1 and "Authorization" not in server.redirected[0]


def test_answers_without_a_rating_are_counted_and_are_not_zero(server):
    """The image takes the mean of its prompt's other images: 2 for the red cube; a true 0 stays a 0."""
    answers = ["2", "0", "I cannot tell"]
    server.answer = lambda body, count: (200, {}, says(answers[count - 1]))
    scorer = _scorer(server, concurrency=1)
    with pytest.warns(UserWarning, match="1 of 3 answers.*no rating"):
        rewards = scorer(images(8), PROMPTS)
    assert rewards.tolist() == [2, 0, 2] and scorer.parse_failures == 1


def test_an_image_whose_prompt_has_no_other_rating_takes_the_batchs_mean(server):
    answers = ["3", "none", "4"]
    server.answer = lambda body, count: (200, {}, says(answers[count - 1]))
    scorer = _scorer(server, concurrency=1)
    with pytest.warns(UserWarning):
        assert scorer(images(8), PROMPTS).tolist() == [3, 3.5, 4]


def test_only_a_warm_model_is_asked_again_after_no_rating(server):
    server.answer = lambda body, count: (200, {}, says("hm" if count == 1 else "5"))
    assert _scorer(server, temperature=0.7)(images(8, count=1), PROMPTS[:1]).tolist() == [5]
    assert [body.get("seed") for _, _, body in server.seen] == [None, 1]


def test_no_rating_at_all_is_an_error(server):
    server.answer = lambda body, count: (200, {}, says("lovely"))
    with pytest.raises(RewardError, match="no answer.*3 images held a rating from 0 to 10"):
        _scorer(server)(images(8), PROMPTS)


@pytest.mark.parametrize(
    "text, rating",
    [("8", 8.0), ("Out of 10 I give 7.5", 7.5), ("0", 0.0), ("11", None), ("-1", None), ("great", None), ("", None)],
)
def test_parse_takes_the_last_number_within_the_scale(text, rating):
    assert VlmReward().load().parse(says(text)) == rating


def test_parse_takes_the_patterns_group_and_survives_any_answer():
    scorer = VlmReward(pattern=r"score: (\d)", highest=5).load()
    assert scorer.parse(says("9 things, score: 4, well 3")) == 4
    for answer in (None, [], {}, {"choices": []}, {"choices": [{"message": {"content": None}}]}, {"error": "x"}):
        assert scorer.parse(answer) is None


@pytest.mark.parametrize(
    "options, message",
    [
        ({"url": "file:///etc/passwd"}, "http://"),
        ({"question": "How good?"}, "{prompt}"),
        ({"lowest": 3, "highest": 3}, "more than reward.lowest"),
        ({"pattern": "("}, "no regular expression"),
        ({"timeout": 0}, "must be positive"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        VlmReward(**options)
