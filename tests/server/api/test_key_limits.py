"""Limits of keys over HTTP: held to the request and the token, told as OpenAI's clients read them, kept on the disk."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from manylora.adapters.keys import KeyTerms
from manylora.adapters.registry import AdapterRegistry
from tests.server.api.running import BASE, Files, Running, asked, running
from tests.server.api.tenants import ADMIN, call, complete, error, new_key

PAGE = "https://app.example"
PROMPT = 10
"""Tokens of complete()'s prompt."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("limits")


@pytest.fixture(scope="module")
def limited(files: Files, data: Path) -> Iterator[Running]:
    with running(files, data, admin_key=ADMIN, cors_origin=PAGE) as server:
        for name in ("a", "b"):
            call(server, "POST", "/adapters", ADMIN, {"name": name, "src": name})
        yield server


def test_requests_per_minute(limited: Running) -> None:
    key = new_key(limited, "acme", requests_per_minute=3)
    answers = [complete(limited, key) for _ in range(5)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
    left = [answer.headers["x-ratelimit-remaining-requests"] for answer in answers]
    assert left == ["2", "1", "0", "0", "0"]
    for answer in answers:
        assert answer.headers["x-ratelimit-limit-requests"] == "3"
        assert re.fullmatch(r"(1m[01](\.\d+)?s)|(\d+(\.\d+)?s)", answer.headers["x-ratelimit-reset-requests"])
        assert "x-ratelimit-limit-tokens" not in answer.headers, "it has no such limit"
    refused = answers[-1]
    assert (error(refused)["type"], error(refused)["code"]) == ("requests", "rate_limit_exceeded")
    assert 1 <= int(refused.headers["retry-after"]) <= 61
    assert "x-should-retry" not in refused.headers
    assert call(limited, "GET", "/v1/models", key).status_code == 200, "looking costs nothing"


def test_tokens_are_reserved_and_settled(limited: Running) -> None:
    key = new_key(limited, "acme", tokens_per_minute=200)
    answer = complete(limited, key, max_tokens=100, stop_token_ids=list(range(256)), ignore_eos=False)
    used = answer.json()["usage"]["total_tokens"]
    assert used < PROMPT + 100
    # The headers are those of the moment in which the answer begins: all of it is still reserved or settled already.
    left = int(complete(limited, key, max_tokens=1).headers["x-ratelimit-remaining-tokens"])
    assert left in (200 - used - PROMPT - 1, 200 - used)
    with ThreadPoolExecutor() as threads:
        with limited.held():
            stuck = threads.submit(complete, limited, key, max_tokens=150)
            limited.wait_until("reserved", lambda: _remaining(limited, key) < 40)
            second = complete(limited, key, max_tokens=150)
        assert (second.status_code, error(second)["type"]) == (429, "tokens"), (
            "not only once they are counted"
        )
        assert int(second.headers["retry-after"]) <= 120
        assert stuck.result().status_code == 200


def _remaining(server: Running, key: str) -> int:
    answer = call(server, "POST", "/v1/completions", key, {})
    return int(answer.headers["x-ratelimit-remaining-tokens"])


def test_more_than_a_minute_holds_is_not_to_be_tried_again(limited: Running) -> None:
    key = new_key(limited, "acme", tokens_per_minute=50)
    answer = complete(limited, key, max_tokens=60)
    assert (answer.status_code, error(answer)["code"]) == (429, "rate_limit_exceeded")
    assert answer.headers["x-should-retry"] == "false"
    assert "retry-after" not in answer.headers
    body = {"model": BASE, "messages": [{"role": "user", "content": "x"}]}
    whole = call(limited, "POST", "/v1/chat/completions", key, {**body, "ignore_eos": True})
    assert whole.status_code == 200, "who names no max_tokens gets what the minute holds"
    assert whole.json()["usage"]["total_tokens"] == 50


def test_requests_that_go_wrong_give_back_what_they_held(limited: Running) -> None:
    key = new_key(limited, "acme", parallel=2, tokens_per_minute=200)
    for _ in range(4):
        assert complete(limited, key, "nobody").status_code == 404
        assert call(limited, "POST", "/v1/completions", key, {"model": BASE}).status_code == 400
        assert complete(limited, key, max_tokens=10**6).status_code in (400, 429)
    assert _remaining(limited, key) == 200
    with limited.failing(RuntimeError("boom")):
        assert complete(limited, key).status_code == 500
    assert _remaining(limited, key) == 200 - PROMPT, "the prompt was computed, or tried to be"
    body: dict[str, object] = {"model": BASE, "prompt": "hello there", "max_tokens": 120, "stream": True}
    with limited.held():
        for _ in range(2):
            head = {"authorization": f"Bearer {key}"}
            with pytest.raises(httpx.TimeoutException):
                httpx.post(f"{limited.url}/v1/completions", json=body, headers=head, timeout=0.2)
    limited.wait_until("left", lambda: _remaining(limited, key) > 100)
    limited.wait_until("left", lambda: complete(limited, key).status_code == 200)


def test_what_the_engine_refuses_gives_back_what_was_reserved(limited: Running) -> None:
    key = new_key(limited, "acme", tokens_per_minute=10_000_000)
    answer = complete(limited, key, max_tokens=1_000_000)
    assert (answer.status_code, error(answer)["code"]) == (400, "context_length_exceeded")
    assert _remaining(limited, key) == 10_000_000


def test_64_streams_at_once_hold_to_the_limits(limited: Running) -> None:
    body = {"model": BASE, "prompt": "hello there", "max_tokens": 2, "stream": True}
    everybody = httpx.Limits(max_connections=64)
    with httpx.Client(base_url=limited.url, limits=everybody, timeout=60) as client:

        def stream(key: str) -> int:
            head = {"authorization": f"Bearer {key}"}
            return client.post("/v1/completions", json=body, headers=head).status_code

        places, requests = (
            new_key(limited, "acme", parallel=8),
            new_key(limited, "acme", requests_per_minute=20),
        )
        with ThreadPoolExecutor(64) as threads:
            with limited.held():
                results = [threads.submit(stream, places) for _ in range(64)]
                limited.wait_until("refused", lambda: sum(each.done() for each in results) >= 56)
            assert sorted(each.result() for each in results) == [200] * 8 + [429] * 56
            results = [threads.submit(stream, requests) for _ in range(64)]
            assert sorted(each.result() for each in results) == [200] * 20 + [429] * 44


def test_a_budget_is_spent_once(limited: Running, data: Path) -> None:
    key = new_key(limited, "acme", budget=40)
    assert complete(limited, key, max_tokens=20).status_code == 200
    over = complete(limited, key, max_tokens=20)
    assert (over.status_code, error(over)["type"], error(over)["code"]) == (
        429,
        "insufficient_quota",
        "insufficient_quota",
    )
    assert over.headers["x-should-retry"] == "false"
    assert "retry-after" not in over.headers
    (record,) = [
        each for each in call(limited, "GET", "/admin/keys", ADMIN).json()["data"] if each["budget"] == 40
    ]
    assert record["used"] == PROMPT + 20
    with limited.client(key).with_options(max_retries=2) as client, limited.logged() as lines:
        with pytest.raises(openai.RateLimitError):
            client.completions.create(model=BASE, prompt="hello there", max_tokens=20)
        limited.wait_until("logged", lambda: bool(lines))
    assert len(lines) == 1, "it wasn't tried again"


def test_what_was_answered_is_spent_whatever_happens(files: Files, tmp_path: Path) -> None:
    """What is on the disk while the server runs is what a kill would leave."""

    def on_disk() -> int:
        (path,) = tmp_path.glob("*/registry.db")
        with AdapterRegistry(path) as registry:
            (record,) = registry.keys.all()
        return record.spent

    with running(files, tmp_path, admin_key=ADMIN) as server:
        key = new_key(server, "acme", budget=1000)
        used = 0
        for _ in range(12):
            used += complete(server, key).json()["usage"]["total_tokens"]
            assert used <= on_disk() <= used + PROMPT + 4 + 64, "a part is lent at a time"
    assert on_disk() == used, "an orderly end takes the rest back"
    with running(files, tmp_path, admin_key=ADMIN) as server:
        (told,) = call(server, "GET", "/admin/keys", ADMIN).json()["data"]
        assert told["used"] == used
        assert complete(server, key, max_tokens=1000 - used).status_code == 429


def test_priority_is_bounded_by_the_key(limited: Running) -> None:
    plain, urgent = new_key(limited, "acme"), new_key(limited, "acme", priority=-5)
    for priority, statuses in ((0, (200, 200)), (7, (200, 200)), (-1, (400, 200)), (-6, (400, 400))):
        found = [complete(limited, key, priority=priority) for key in (plain, urgent)]
        assert tuple(each.status_code for each in found) == statuses
    assert error(found[0])["param"] == "priority"
    assert "this key may ask for is 0" in error(found[0])["message"]


def test_without_keys_no_priority_is_below_zero(server: Running) -> None:
    answers = [complete(server, None, priority=priority) for priority in (0, 7, -1)]
    assert [answer.status_code for answer in answers] == [200, 200, 400]
    assert "may be asked for on a server without keys is 0" in error(answers[-1])["message"]


def test_changes_count_as_requests(limited: Running) -> None:
    key = new_key(limited, "acme", rights=["infer", "manage"], requests_per_minute=3, budget=PROMPT + 4)
    assert complete(limited, key).status_code == 200, "which uses up the budget"
    answers = [call(limited, "DELETE", "/adapters/acme/none", key) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [404, 404, 429]
    assert error(answers[-1])["code"] == "rate_limit_exceeded"
    assert answers[-1].headers["x-ratelimit-remaining-requests"] == "0"
    assert call(limited, "GET", "/adapters", key).status_code == 200, "looking costs nothing"


def test_what_changes_nothing_is_not_tried_again(limited: Running) -> None:
    taken = call(limited, "POST", "/adapters", ADMIN, {"name": "a", "src": "b"}, origin=PAGE)
    assert (taken.status_code, taken.headers["x-should-retry"]) == (409, "false")
    fine = complete(limited, ADMIN)
    assert "x-should-retry" not in fine.headers
    assert fine.headers["openai-version"] == "2020-10-01"
    assert 0 <= int(fine.headers["openai-processing-ms"]) < 60_000
    exposed = set(taken.headers["access-control-expose-headers"].lower().split(", "))
    assert exposed >= {"x-request-id", "retry-after", "x-should-retry", "openai-processing-ms"}
    for kind in ("requests", "tokens"):
        assert exposed >= {f"x-ratelimit-{what}-{kind}" for what in ("limit", "remaining", "reset")}


def test_a_full_disk_is_not_tried_again(limited: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    from manylora.adapters.errors import StoreFull

    def full(terms: KeyTerms) -> None:
        raise StoreFull("the disk is full")

    keys = limited.server.deps.keys
    monkeypatch.setattr(keys._store, "create", full)
    answer = call(limited, "POST", "/admin/keys", ADMIN, {"tenant": "acme"})
    assert (answer.status_code, answer.headers["x-should-retry"]) == (507, "false")


def test_nobody_waits_longer_than_clients_do(limited: Running) -> None:
    from manylora.server.api.error_responses import error_response
    from manylora.server.errors import QueueFull

    assert error_response(QueueFull("x", retry_after=500)).headers["retry-after"] == "120"
    assert error_response(QueueFull("x", retry_after=0.2)).headers["retry-after"] == "1"


def test_durations_are_openais() -> None:
    from manylora.server.api.rate_headers import duration

    told = {0.0: "0s", 0.0121: "13ms", 0.012: "12ms", 1.0: "1s", 1.5: "1.5s", 59.9999: "1m0s", 360.0: "6m0s"}
    assert {seconds: duration(seconds) for seconds in told} == told


def test_a_client_that_leaves_frees_its_place(limited: Running) -> None:
    key = new_key(limited, "acme", parallel=1)
    body: dict[str, object] = {"model": BASE, "prompt": "hello there", "max_tokens": 200, "ignore_eos": True}
    for _ in range(3):
        with asked(limited, body, f"/v1/completions HTTP/1.1\r\nauthorization: Bearer {key}\r\nx-rest:"):
            limited.wait_until_busy()
        limited.wait_until("free", lambda: complete(limited, key).status_code == 200)


def _key_of(server: Running, secret: str) -> str:
    keys = call(server, "GET", "/admin/keys", ADMIN).json()["data"]
    found: str = next(each["id"] for each in keys if each["hint"][1:] == secret[-4:])
    return found


def _change(server: Running, secret: str, **changes: object) -> httpx.Response:
    return call(server, "PATCH", f"/admin/keys/{_key_of(server, secret)}", ADMIN, changes)


def test_other_limits_act_on_the_next_request(limited: Running) -> None:
    key = new_key(limited, "acme", parallel=1)
    with ThreadPoolExecutor() as threads, limited.held():
        running = threads.submit(complete, limited, key)
        limited.wait_until_busy()  # before another asks, which could have the one place
        assert complete(limited, key, "nobody").status_code == 429
        changed = _change(limited, key, parallel=2)
        assert (changed.status_code, changed.json()["parallel"]) == (200, 2)
        assert complete(limited, key, "nobody").status_code == 404
        assert _change(limited, key, parallel=1).status_code == 200
        assert complete(limited, key, "nobody").status_code == 429
    assert running.result().status_code == 200
    assert _change(limited, key, unlimited=["parallel"]).json()["parallel"] is None
    counted = new_key(limited, "acme", requests_per_minute=1)
    assert complete(limited, counted).status_code == 200
    assert _change(limited, counted, requests_per_minute=3).status_code == 200
    assert [complete(limited, counted).status_code for _ in range(2)] == [200, 200]
    refused = complete(limited, counted)
    assert (refused.status_code, refused.headers["x-ratelimit-limit-requests"]) == (429, "3"), (
        "what was sent counts"
    )
    _change(limited, counted, unlimited=["requests_per_minute"], models=["b"])
    assert [complete(limited, counted, model).status_code for model in ("b", BASE)] == [200, 404]


def test_a_budget_is_raised(limited: Running) -> None:
    key = new_key(limited, "acme", budget=PROMPT + 4)
    assert [complete(limited, key).status_code for _ in range(2)] == [200, 429]
    assert _change(limited, key, budget=2 * (PROMPT + 4)).json()["used"] == PROMPT + 4
    assert [complete(limited, key).status_code for _ in range(2)] == [200, 429]


def test_a_change_is_written_down_with_what_it_was(limited: Running, data: Path) -> None:
    key = new_key(limited, "acme")
    named = _key_of(limited, key)
    _change(limited, key, budget=123, unlimited=["parallel"])

    def told() -> list[dict[str, object]]:
        lines = map(json.loads, (data / "audit.jsonl").read_text().splitlines())
        return [line for line in lines if line.get("key") == named and line["act"].startswith("PATCH")]

    limited.wait_until("written", lambda: bool(told()))
    assert told()[0]["changed"] == {"budget": 123, "unlimited": ["parallel"]}
    assert key not in str(told())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "nothing is to be changed"),
        ({"tenant": "globex"}, "tenant"),
        ({"budget": 0}, "budget"),
        ({"budget": "many"}, "budget"),
        ({"weight": 0}, "weight"),
        ({"rights": ["root"]}, "no right 'root'"),
        ({"rights": []}, "without a right"),
        ({"models": ["[x]"]}, "pattern '[x]'"),
        ({"expires_at": "soon"}, "'soon' is no time"),
        ({"expires_at": "2020-01-01T01:00+01:00"}, "2020-01-01T00:00Z is over"),
        ({"unlimited": ["weight"]}, "'weight' is no limit"),
        ({"unlimited": ["budget"], "budget": 5}, "choose one"),
    ],
)
def test_a_change_that_makes_no_sense_changes_nothing(
    limited: Running, changes: dict[str, object], said: str
) -> None:
    key = new_key(limited, "acme", budget=1000, parallel=3)
    before = call(limited, "GET", f"/admin/keys/{_key_of(limited, key)}", ADMIN).json()
    answer = _change(limited, key, **changes)
    assert answer.status_code == 400, answer.text
    assert said in error(answer)["message"]
    assert call(limited, "GET", f"/admin/keys/{before['id']}", ADMIN).json() == before


def test_only_who_administers_changes_keys_and_none_that_is_over(limited: Running) -> None:
    key, other = new_key(limited, "acme", rights=["infer", "manage"]), new_key(limited, "acme")
    path = f"/admin/keys/{_key_of(limited, other)}"
    assert call(limited, "PATCH", path, key, {"budget": 5}).status_code == 403
    assert call(limited, "PATCH", path, None, {"budget": 5}).status_code == 401
    assert call(limited, "DELETE", path, ADMIN).status_code == 200
    over = call(limited, "PATCH", path, ADMIN, {"budget": 5})
    assert (over.status_code, "is revoked" in over.text) == (404, True)
    assert call(limited, "PATCH", "/admin/keys/key-1", ADMIN, {"budget": 5}).status_code == 404
