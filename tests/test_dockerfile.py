"""What the Dockerfile says about a running container, tried without Docker."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

DOCKERFILE = Path(__file__).resolve().parents[1] / "Dockerfile"


def health_checks() -> list[list[str]]:
    lines = DOCKERFILE.read_text().splitlines()
    return [
        json.loads(lines[number + 1].strip().removeprefix("CMD "))
        for number, line in enumerate(lines)
        if line.startswith("HEALTHCHECK")
    ]


class Ready(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/ready" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    with HTTPServer(("127.0.0.1", 0), Ready) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def test_the_health_check_asks_the_port_that_the_server_was_given(port: int) -> None:
    checks = health_checks()
    assert len(checks) == 2
    for program, *arguments in checks:
        assert program == "python"
        for given, status in ((str(port), 0), ("1", 1)):
            environment = {**os.environ, "MANYLORA_PORT": given}
            ended = subprocess.run(
                [sys.executable, *arguments], env=environment, capture_output=True, timeout=60, check=False
            )
            assert ended.returncode == status


def test_without_a_port_it_asks_8000() -> None:
    for _, _, code in health_checks():
        assert "or '8000'" in code


def test_the_comment_says_what_the_host_may_not_do_without_a_key() -> None:
    comments = " ".join(line[1:] for line in DOCKERFILE.read_text().splitlines() if line.startswith("#"))
    assert "MANYLORA_ADMIN_KEY" in comments
    assert "403" in comments
