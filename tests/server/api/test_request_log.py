"""A request's log line: what was asked, what it cost, and why it was refused."""

from collections.abc import Callable
from functools import partial

import httpx
import pytest

from tests.server.api.running import Line, Running, asked

CHAT: dict[str, object] = {"model": "a", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
COMPLETION: dict[str, object] = {"model": "a", "prompt": [5, 6, 7], "max_tokens": 3, "ignore_eos": True}
LineOf = Callable[[Callable[[], object]], Line]


@pytest.fixture
def line_of(server: Running) -> LineOf:
    """Returns the one line that a call leaves; a stream's comes when the server has noticed its end."""

    def find(call: Callable[[], object]) -> Line:
        with server.logged() as lines:
            call()
            server.wait_until("logged", lambda: bool(lines))
        [line] = lines
        return line

    return find


def test_it_carries_the_request_id_and_probes_are_not_logged(line_of: LineOf, http: httpx.Client) -> None:
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
def test_it_carries_the_model_and_its_tokens(
    line_of: LineOf, http: httpx.Client, path: str, stream: bool
) -> None:
    body = {**(CHAT if "chat" in path else COMPLETION), "ignore_eos": True, "n": 2}
    usage = http.post(path, json=body).json()["usage"]
    line = line_of(lambda: http.post(path, json={**body, "stream": stream}))
    assert (line["model"], line["status"], line["log_level"]) == ("a", 200, "info")
    assert (line["prompt_tokens"], line["completion_tokens"]) == (usage["prompt_tokens"], 6)
    assert "reason" not in line


def test_tokens_are_those_of_the_usage_when_only_the_prompt_is_scored(
    line_of: LineOf, http: httpx.Client
) -> None:
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
    line_of: LineOf, http: httpx.Client, body: dict[str, object], status: int, code: str | None, reason: str
) -> None:
    line = line_of(lambda: http.post("/v1/completions", json=body))
    assert (line["status"], line["model"], line.get("code")) == (status, body["model"], code)
    assert reason in str(line["reason"])


def test_it_says_which_adapter_was_to_change_and_why_not(line_of: LineOf, http: httpx.Client) -> None:
    line = line_of(lambda: http.post("/adapters", json={"name": "x", "src": "nowhere"}))
    assert (line["name"], line["status"], line["code"]) == ("x", 400, "adapter_not_found")
    assert "nowhere" in str(line["reason"])
    line = line_of(lambda: http.post("/v1/unload_lora_adapter", json={"lora_name": "x"}))
    assert (line["lora_name"], line["status"]) == ("x", 404)
    line = line_of(lambda: http.get("/v1/nothing"))
    assert (line["status"], line["code"]) == (404, "not_found")


def test_a_failure_of_the_servers_is_a_warning(server: Running, line_of: LineOf, http: httpx.Client) -> None:
    with server.failing(RuntimeError("x")):
        line = line_of(lambda: http.post("/v1/completions", json=COMPLETION))
    assert (line["status"], line["code"], line["log_level"]) == (500, "step_failed", "warning")
    http.post("/v1/completions", json=COMPLETION).raise_for_status()


@pytest.mark.parametrize("stream", [False, True])
def test_it_says_that_the_client_hung_up(line_of: LineOf, server: Running, stream: bool) -> None:
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


def test_what_clients_make_up_is_cut(line_of: LineOf, http: httpx.Client) -> None:
    long = "x" * 5000
    line = line_of(lambda: http.post(f"/v1/{long}", json={}))
    assert len(str(line["path"])) < 400
    line = line_of(lambda: http.post("/v1/completions", json={**COMPLETION, "model": long}))
    assert len(str(line["model"])) < 400
    assert len(str(line["reason"])) < 400


def test_a_body_that_says_no_model_is_logged_all_the_same(line_of: LineOf, http: httpx.Client) -> None:
    for content in (b"{", b"[]", b'{"model": 3}', b'{"model": "\\ud800"}'):
        line = line_of(partial(http.post, "/v1/completions", content=content))
        assert line["status"] == 400
        assert "model" not in line
        assert line["reason"]
