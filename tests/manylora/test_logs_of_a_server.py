"""A server's whole life in its log: JSON where nobody watches, text on a terminal."""

import json
import os
import pty
import signal
import subprocess
from pathlib import Path

import httpx
import pytest

from manylora.loadtest.material.checkpoints import write_base
from manylora.loadtest.material.server_process import command, environment_of_children
from tests.serving import serving


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("files") / "base")


def test_every_line_of_a_file_is_json(base: Path, tmp_path: Path) -> None:
    with serving(tmp_path, str(base), "--kv-cache-gib", "0.05", "--host", "0.0.0.0") as server:
        httpx.get(f"{server.url}/v1/models/nobody")
        server.interrupt()
        assert server.process.wait(timeout=30) == 0
        lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    events = [line["event"] for line in lines]
    [request] = [line for line in lines if line["event"] == "request" and line["path"].endswith("nobody")]
    assert (request["status"], request["code"]) == (404, "model_not_found")
    [listening] = [line for line in lines if line["event"].startswith("listening on http://")]
    assert listening["base"].startswith("base: 2 layers")
    assert any("MANYLORA_ADMIN_KEY" in event for event in events)
    assert any(event.startswith("draining 0 running") for event in events)
    for line in lines:
        assert {"event", "level", "timestamp"} <= set(line)


def test_on_a_terminal_all_of_it_is_text(base: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    line = command("serve", str(base), "--port", "0", "--data-dir", str(tmp_path), "--kv-cache-gib", "0.05")
    process = subprocess.Popen(line, stderr=theirs, env={**environment_of_children(), "TERM": "xterm"})
    os.close(theirs)
    written = b""
    try:
        while b"/docs" not in written:
            written += os.read(ours, 4096)
        url = next(word for word in written.decode().split() if word.startswith("http://127.0.0.1"))
        httpx.get(f"{url.removesuffix('/v1')}/v1/models/nobody")
        while b"nobody" not in written:
            written += os.read(ours, 4096)
        process.send_signal(signal.SIGINT)
        while b"draining" not in written:
            written += os.read(ours, 4096)
    finally:
        os.close(ours)
        process.kill()
        process.wait()
    assert b'{"' not in written
    assert b"KV cache" in written
