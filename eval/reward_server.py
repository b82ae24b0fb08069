"""Serves any reward to `--reward http`: `python eval/reward_server.py --reward clip --port 8000`.

All options of a reward are those of train_sd3.py (`--reward clip=1,ocr=0.5`, `--reward.model` ...). It listens on this
computer only; another --host needs a token, which clients send as `Authorization: Bearer ...`. The protocol is in
docs/rewards.md. It speaks plain HTTP: put it behind a proxy with TLS, or an ssh tunnel, on a network you do not trust.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from sd3_adrpo import cli
from sd3_adrpo.errors import UserError, exit_code

PROGRAM = "reward_server.py"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class RewardServer(ThreadingHTTPServer):
    """Answers several clients at once; the reward itself scores one batch at a time."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], scoring: Any, token: str | None = None, max_mb: float = 256) -> None:
        super().__init__(address, Handler)
        self.scoring, self.token, self.max_bytes, self.lock = scoring, token, int(max_mb * 1e6), threading.Lock()

    @property
    def url(self) -> str:
        return f"http://{self.server_address[0]}:{self.server_address[1]}"

    def scores(self, data: bytes, content_type: str) -> list[float]:
        from sd3_adrpo.rewards._protocol import decode_request

        images, prompts = decode_request(data, content_type)
        with self.lock:
            return self.scoring.total(self.scoring(images, prompts)).tolist() if prompts else []


class Handler(BaseHTTPRequestHandler):
    server: RewardServer
    timeout = 60  # seconds that a client may take to send its request

    def do_GET(self) -> None:
        if self._allowed():
            scoring = self.server.scoring
            names = [key.partition("/")[2] for key in scoring.weights]
            self._answer(200, {"name": ", ".join(names), "unit": scoring.unit, "encoder": scoring.encoder})

    def do_POST(self) -> None:
        if not self._allowed():
            return
        try:
            size = int(self.headers.get("Content-Length", ""))
        except ValueError:
            return self._answer(411, {"error": "the request needs a Content-Length"})
        if not 0 <= size <= self.server.max_bytes:
            return self._answer(413, {"error": f"{size} bytes; at most {self.server.max_bytes}: send fewer images"})
        from sd3_adrpo.rewards._protocol import ProtocolError

        try:
            scores = self.server.scores(self.rfile.read(size), self.headers.get("Content-Type", ""))
        except ProtocolError as error:
            return self._answer(400, {"error": str(error)})
        except Exception as error:  # whatever a reward raises is the server's fault, and may pass
            print(f"reward_server.py: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            return self._answer(500, {"error": f"{type(error).__name__}: {error}"})
        self._answer(200, {"scores": scores})

    def _allowed(self) -> bool:
        given = self.headers.get("Authorization", "").encode()
        if self.server.token is None or secrets.compare_digest(given, f"Bearer {self.server.token}".encode()):
            return True
        self._answer(401, {"error": "a bearer token is needed, or is another"})
        return False

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        if status != 200:  # what the client sent may be unread
            self.close_connection = True
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Quiet: a training run asks hundreds of times."""


def serve(args: argparse.Namespace, options: Sequence[str]) -> RewardServer:
    """The server, bound and with its reward loaded."""
    token = os.environ.get(args.token_variable or "")
    if args.token_variable and not token:
        raise UserError(f"token_variable is {args.token_variable}, which is not set: export it")
    if args.host not in LOOPBACK and not token:
        raise UserError(f"host is {args.host}: others could reach it, so it needs a --token_variable")
    config = cli.parse(options, PROGRAM)
    config.reward.describe()
    from sd3_adrpo.scoring import Scoring  # late: loads torch

    if args.device is None:
        import torch

        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return RewardServer((args.host, args.port), Scoring.load(config, args.device), token, args.max_mb)
    except (OSError, OverflowError) as error:  # the latter of a port over 65535
        raise UserError(f"cannot listen on {args.host}:{args.port} ({error}): take another --port") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Runs until interrupted. Exit code: 0 then, 1 an error the user can mend, 2 bad options."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; the default is this computer only")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one, which is printed")
    parser.add_argument("--token_variable", help="environment variable with the token that clients must send")
    parser.add_argument("--max_mb", type=float, default=256, help="largest request")
    parser.add_argument("--device", help="none: cuda where there is one")
    args, options = parser.parse_known_args(argv)
    return exit_code(PROGRAM, lambda: run(args, options))


def run(args: argparse.Namespace, options: Sequence[str]) -> None:
    """Serves until Ctrl+C."""
    server = serve(args, options)
    print(f"serving {server.scoring.unit}, {server.scoring.encoder} on {server.url}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    server.server_close()


if __name__ == "__main__":
    sys.exit(main())
