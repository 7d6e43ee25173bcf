"""A request's log line: what was asked, what it cost, and why it was refused."""

import time
from collections.abc import Callable

import httpx
import pytest
from structlog.contextvars import merge_contextvars
from structlog.testing import capture_logs

from tests.server.api.running import SECONDS, Running, asked

CHAT: dict[str, object] = {"model": "a", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
COMPLETION: dict[str, object] = {"model": "a", "prompt": [5, 6, 7], "max_tokens": 3, "ignore_eos": True}
Line = dict[str, object]


def line_of(call: Callable[[], object]) -> Line:
    """Return the one line that a call leaves; a stream's comes when the server has noticed its end."""
    with capture_logs(processors=[merge_contextvars]) as lines:
        call()
        deadline = time.monotonic() + SECONDS
        while not lines and time.monotonic() < deadline:
            time.sleep(0.002)
    [line] = lines
    return dict(line)


def test_it_carries_the_request_id_and_probes_are_not_logged(http: httpx.Client) -> None:
    answers = []

    def ask() -> None:
        http.get("/health")
        http.get("/metrics")
        answers.append(http.post("/v1/completions", json={**COMPLETION, "model": "nobody"}))

    line = line_of(ask)
    assert line["request_id"] == answers[0].headers["x-request-id"]
    assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/completions", 404)
    assert isinstance(line["seconds"], float)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_it_carries_the_model_and_its_tokens(http: httpx.Client, path: str, stream: bool) -> None:
    body = {**(CHAT if "chat" in path else COMPLETION), "ignore_eos": True, "n": 2}
    usage = http.post(path, json=body).json()["usage"]
    line = line_of(lambda: http.post(path, json={**body, "stream": stream}))
    assert (line["model"], line["status"], line["log_level"]) == ("a", 200, "info")
    assert (line["prompt_tokens"], line["completion_tokens"]) == (usage["prompt_tokens"], 6)
    assert "reason" not in line


def test_tokens_are_those_of_the_usage_when_only_the_prompt_is_scored(http: httpx.Client) -> None:
    body = {**COMPLETION, "prompt": [[5, 6], [7]], "max_tokens": 0, "echo": True}
    line = line_of(lambda: http.post("/v1/completions", json=body))
    assert (line["prompt_tokens"], line["completion_tokens"]) == (3, 0)


@pytest.mark.parametrize(
    ("body", "status", "code", "reason"),
    [
        ({**COMPLETION, "model": "nobody"}, 404, "model_not_found", "model 'nobody' does not exist"),
        ({**COMPLETION, "temprature": 1}, 400, None, "temprature"),
        ({**COMPLETION, "max_tokens": 5000}, 400, "context_length_exceeded", "5000"),
    ],
)
def test_it_says_why_a_request_was_refused(
    http: httpx.Client, body: Line, status: int, code: str | None, reason: str
) -> None:
    line = line_of(lambda: http.post("/v1/completions", json=body))
    assert (line["status"], line["model"], line.get("code")) == (status, body["model"], code)
    assert reason in str(line["reason"])


def test_it_says_which_adapter_was_to_change_and_why_not(http: httpx.Client) -> None:
    line = line_of(lambda: http.post("/adapters", json={"name": "x", "src": "nowhere"}))
    assert (line["name"], line["status"], line["code"]) == ("x", 400, "adapter_not_found")
    assert "nowhere" in str(line["reason"])
    line = line_of(lambda: http.post("/v1/unload_lora_adapter", json={"lora_name": "x"}))
    assert (line["lora_name"], line["status"]) == ("x", 404)
    line = line_of(lambda: http.get("/v1/nothing"))
    assert (line["status"], line["code"]) == (404, "not_found")


def test_a_failure_of_the_servers_is_a_warning(server: Running, http: httpx.Client) -> None:
    with server.failing(RuntimeError("x")):
        line = line_of(lambda: http.post("/v1/completions", json=COMPLETION))
    assert (line["status"], line["code"], line["log_level"]) == (500, "step_failed", "warning")
    http.post("/v1/completions", json=COMPLETION).raise_for_status()


@pytest.mark.parametrize("stream", [False, True])
def test_it_says_that_the_client_hung_up(server: Running, stream: bool) -> None:
    body = {**COMPLETION, "max_tokens": 900, "stream": stream}

    def leave() -> None:
        with server.held() as go_on, asked(server, body) as connection:
            server.wait_until_busy()
            if stream:
                go_on.set()
                assert connection.recv(1)

    line = line_of(leave)
    assert line["status"] == (200 if stream else 499)
    assert line["reason"] == "the client hung up"
    assert line["prompt_tokens"] == 3
    made = line["completion_tokens"]
    assert isinstance(made, int)
    assert stream <= made < 900


def test_what_clients_make_up_is_cut(http: httpx.Client) -> None:
    long = "x" * 5000
    line = line_of(lambda: http.post(f"/v1/{long}", json={}))
    assert len(str(line["path"])) < 400
    line = line_of(lambda: http.post("/v1/completions", json={**COMPLETION, "model": long}))
    assert len(str(line["model"])) < 400
    assert len(str(line["reason"])) < 400


def test_a_body_that_says_no_model_is_logged_all_the_same(http: httpx.Client) -> None:
    for content in (b"{", b"[]", b'{"model": 3}', b'{"model": "\\ud800"}'):
        line = line_of(lambda content=content: http.post("/v1/completions", content=content))  # type: ignore[misc]
        assert line["status"] == 400
        assert "model" not in line
        assert line["reason"]
