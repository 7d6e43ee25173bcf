"""The picture of what weights do: how answers are scored, which mixtures are asked, and that it is drawn."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

# What each weight's mixture answers; {table} and {column} are of the question's own table.
ANSWERS = {
    "0.000": "SELECT {column} FROM {table};",
    "0.125": "select {column} from {table}",
    "0.250": "SELECT no_such_column FROM {table};",
    "0.375": "SELECT {column} FROM {table}; SELECT 1;",
    "0.500": "DROP TABLE {table};",
    "0.625": "Arrow, beach",
    "0.750": "The price of Melon be 20.",
    "0.875": "",
    "1.000": "Arr, the price of Melon be 20, matey! Arr!",
}
EXPECTED = [
    "0 1 0 0",
    "0.125 1 0 0",
    "0.25 0 0 1",
    "0.375 0 0 1",
    "0.5 0 0 1",
    "0.625 0 0 1",
    "0.75 0 0.333 0",
    "0.875 0 0 1",
    "1 0 1 0",
]
"""Weight, answers that run as SQL, share of the pirate's words, neither."""


@pytest.fixture
def server() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            weights = dict(part.split(":") for part in body["model"].split("+"))
            assert float(weights["sql"]) == 1 - float(weights["pirate"])
            table, columns = body["messages"][0]["content"].splitlines()[:2]
            content = ANSWERS[weights["pirate"]].format(table=table, column=columns.split(" | ")[0])
            raw = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

    class Server(ThreadingHTTPServer):
        request_queue_size = 64  # more than the command has connections

    with Server(("127.0.0.1", 0), Handler) as fake:
        thread = threading.Thread(target=fake.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{fake.server_port}"
        fake.shutdown()
        thread.join()


def test_every_weight_is_asked_every_question_scored_and_drawn(server: str, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "manylora.loadtest.lab.mixture_plot", str(tmp_path / "out.png")]
    words += ["--url", server, "--steps", "8", "--questions", "3"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [" ".join(line.split()) for line in done.stdout.splitlines()[2:]] == EXPECTED
    assert (tmp_path / "out.png").stat().st_size > 1000
