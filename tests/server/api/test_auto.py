"""The model "auto": a request goes to the adapter of whose examples its prompt is, and is that adapter's from there on.

The base is a small one of random weights, whose states tell texts apart well enough: an example itself is nearest to
its adapter.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from manylora.adapters.manifest import AdapterManifest, write_manifest
from tests.server.api.running import BASE, Files, Running, asked, running
from tests.server.api.tenants import ADMIN, call, error, names, new_key

EXAMPLES = {
    "one": ("alpha beta gamma delta alpha beta gamma delta", "alpha alpha beta beta gamma gamma delta delta"),
    "two": ("7 8 9 10 11 12 13 14 15 16 17", "17 16 15 14 13 12 11 10 9 8 7"),
}
NOBODYS = "Write a poem about autumn."
"""One of the base's own examples."""
WAYS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")


@pytest.fixture(scope="module")
def adapters(files: Files) -> Iterator[None]:
    for name, source in (("one", "a"), ("two", "b"), ("other-two", "b")):
        target = files.adapters / name
        shutil.copytree(files.adapters / source, target)
        write_manifest(target, AdapterManifest(f"for {name}", EXAMPLES[name.removeprefix("other-")]))
    yield
    for name in ("one", "two", "other-two"):
        shutil.rmtree(files.adapters / name)


@pytest.fixture(scope="module")
def house(files: Files, adapters: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(files, tmp_path_factory.mktemp("auto"), admin_key=ADMIN, auto_wait=30) as server:
        for name, src in (("one", "one"), ("two", "two"), ("silent", "c")):
            body = {"name": name, "src": src}
            assert call(server, "POST", "/adapters", ADMIN, body).status_code == 201
        yield server
        server.wait_until_idle()
        server.check_integrity()


def body_of(way: str, text: str, model: str = "auto", **more: object) -> dict[str, object]:
    common = {"model": model, **more}
    if way == "/v1/completions":
        return {**common, "prompt": text, "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    if way == "/v1/responses":
        return {**common, "input": text, "max_output_tokens": 6, "temperature": 0}
    messages = [{"role": "user", "content": text}]
    return {**common, "messages": messages, "max_tokens": 6, "temperature": 0}


def ask(server: Running, way: str, text: str, model: str = "auto", **more: object) -> httpx.Response:
    answer = call(server, "POST", way, ADMIN, body_of(way, text, model, **more))
    assert answer.status_code == 200, answer.text
    return answer


def without_marks(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer without what is its own alone, whoever gave it."""
    for name in ("id", "created", "created_at", "auto", "usage"):
        answer.pop(name, None)
    for item in answer.get("output", ()):
        item.pop("id", None)
    return answer


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["one", "two", BASE])
def test_each_way_of_asking_is_answered_by_the_one_whose_prompt_it_is(
    house: Running, way: str, name: str
) -> None:
    for text in EXAMPLES.get(name, (NOBODYS,)):
        answer = ask(house, way, text)
        told = answer.json()
        assert (told["model"], told["auto"]["model"]) == (name, name)
        assert told["auto"]["nearest"] == name
        assert told["auto"]["score"] > 0.5 > told["auto"]["second"]["score"]
        assert told["auto"]["prompt_tokens"] > 0
        assert answer.headers["x-manylora-auto"] == f"{name};score={told['auto']['score']:.4f}"
        by_name = ask(house, way, text, name)
        assert "x-manylora-auto" not in by_name.headers
        assert "auto" not in by_name.json()
        assert without_marks(told) == without_marks(by_name.json())


@pytest.mark.parametrize("way", WAYS)
def test_a_stream_tells_it_when_it_begins(house: Running, way: str) -> None:
    answer = ask(house, way, EXAMPLES["two"][0], stream=True)
    assert answer.headers["x-manylora-auto"].startswith("two;score=")
    first = next(line for line in answer.text.splitlines() if line.startswith("data: "))
    event = json.loads(first.removeprefix("data: "))
    begun = event.get("message") or event.get("response") or event
    assert (begun["model"], begun["auto"]["model"]) == ("two", "two")


def test_one_extra_prompt_is_read_and_all_is_counted(house: Running) -> None:
    def count() -> tuple[float, float, float]:
        ended = house.metric("manylora_requests_total", adapter="auto", outcome="finished")
        given = house.metric("manylora_auto_requests_total", adapter="one")
        scores = house.metric("manylora_auto_score_count")
        return ended or 0, given or 0, scores or 0

    ask(house, WAYS[0], EXAMPLES["one"][0])
    before = count()
    tokens = house.metric("manylora_tokens_total", adapter="auto", kind="prompt") or 0
    answer = ask(house, WAYS[0], EXAMPLES["one"][0], n=3).json()
    assert [now - then for now, then in zip(count(), before, strict=True)] == [1, 1, 1]
    read = (house.metric("manylora_tokens_total", adapter="auto", kind="prompt") or 0) - tokens
    assert read == answer["auto"]["prompt_tokens"] == answer["usage"]["prompt_tokens"]


def test_what_was_read_to_choose_the_base_is_not_read_again(house: Running) -> None:
    answer = ask(house, WAYS[0], f"{NOBODYS} {NOBODYS} {NOBODYS}").json()
    assert answer["model"] == BASE
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= 16


def test_a_conversation_goes_where_its_last_user_turns_to_whatever_was_said_and_called_since(
    house: Running,
) -> None:
    def chosen(*turns: tuple[str, str]) -> dict[str, Any]:
        body = body_of(WAYS[0], "")
        body["messages"] = [{"role": role, "content": text} for role, text in turns]
        answer = call(house, "POST", WAYS[0], ADMIN, body)
        assert answer.status_code == 200, answer.text
        told: dict[str, Any] = answer.json()["auto"]
        return told

    one, two = EXAMPLES["one"][0], EXAMPLES["two"][0]
    turned = chosen(("system", "Be brief."), ("user", one), ("assistant", "yes"), ("user", two))
    gone_on = chosen(
        ("system", "Be brief."), ("user", one), ("assistant", "yes"), ("user", two), ("assistant", one)
    )
    assert gone_on == turned


def test_the_log_line_says_what_was_chosen(house: Running) -> None:
    with house.logged() as lines:
        ask(house, WAYS[0], EXAMPLES["one"][0])
        house.wait_until("logged", lambda: any(line.get("path") == WAYS[0] for line in lines))
    [line] = [line for line in lines if line.get("path") == WAYS[0]]
    assert line["auto"] == "one"
    assert isinstance(line["auto_score"], float)


def refused(server: Running, way: str, body: dict[str, object], key: str = ADMIN) -> tuple[int, str, str]:
    answer = call(server, "POST", way, key, body)
    told = error(answer)
    return answer.status_code, told["param"], told["message"]


@pytest.mark.parametrize(
    ("way", "changes", "param", "said"),
    [
        ("/v1/completions", {"prompt": ["a", "b"]}, "prompt", "send a request for each"),
        ("/v1/completions", {"prompt": [5, 6]}, "prompt", "send a text"),
        ("/v1/completions", {"prompt": "a", "adapters": [{"name": "one"}]}, "adapters", "names the base"),
        (
            "/v1/completions",
            {"prompt": "a", "merged_adapters": {"ids": ["one"]}},
            "merged_adapters",
            "names the base",
        ),
        ("/v1/embeddings", {"input": "a"}, "model", "name one here"),
        ("/tokenize", {"prompt": "a"}, "model", "name one here"),
    ],
)
def test_what_leaves_nothing_to_choose_is_refused_by_name(
    house: Running, way: str, changes: dict[str, object], param: str, said: str
) -> None:
    status, told, message = refused(house, way, {"model": "auto", **changes})
    assert (status, told) == (400, param)
    assert said in message


def test_nothing_else_may_have_the_name(house: Running) -> None:
    for body in (
        {"name": "auto", "src": "a"},
        {"name": "auto", "mixture": [{"adapter": "one"}]},
    ):
        answer = call(house, "POST", "/adapters", ADMIN, body)
        assert answer.status_code == 400
        assert "choose another" in error(answer)["message"]


def test_messages_are_counted_as_the_base_reads_them(house: Running) -> None:
    messages = [{"role": "user", "content": EXAMPLES["one"][0]}]
    counted = [
        call(house, "POST", "/v1/messages/count_tokens", ADMIN, {"model": model, "messages": messages}).json()
        for model in ("auto", BASE)
    ]
    assert counted[0] == counted[1]


def test_examples_may_be_given_and_changed_by_who_manages_adapters(house: Running) -> None:
    words = {"description": "Of primes.", "examples": ["2 3 5 7 11 13 17 19 23 29 31"], "threshold": -1}
    made = call(house, "POST", "/adapters", ADMIN, {"name": "said", "src": "c", **words})
    assert made.status_code == 201, made.text
    try:
        assert call(house, "GET", "/adapters/said", ADMIN).json()["auto"] == words
        told = ask(house, WAYS[0], words["examples"][0]).json()["auto"]  # type: ignore[index]
        assert (told["model"], told["threshold"]) == ("said", -1)
        changed = call(house, "PATCH", "/adapters/said", ADMIN, {"examples": []})
        assert changed.json()["auto"] == {**words, "examples": []}
        assert changed.json()["version"] == made.json()["version"]
        assert ask(house, WAYS[0], words["examples"][0]).json()["model"] != "said"  # type: ignore[index]
    finally:
        call(house, "DELETE", "/adapters/said", ADMIN)
    again = call(house, "POST", "/adapters", ADMIN, {"name": "said", "src": "c"})
    assert again.status_code == 201
    nothing: dict[str, object] = {"description": None, "examples": [], "threshold": None}
    assert call(house, "GET", "/adapters/said", ADMIN).json()["auto"] == nothing
    assert call(house, "DELETE", "/adapters/said", ADMIN).status_code == 200


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"examples": ["a", 5]}, "examples.1"),
        ({"examples": ["x"] * 33}, "at most 32"),
        ({"examples": ["x" * 2001]}, "at most 2000"),
        ({"examples": [" "]}, r"examples[0] is empty"),
        ({"threshold": 1.5}, "threshold"),
        ({"description": "x" * 1001}, "description"),
        ({}, "nothing is said"),
    ],
)
def test_words_that_none_could_say_are_refused_and_change_nothing(
    house: Running, words: dict[str, object], said: str
) -> None:
    before = call(house, "GET", "/adapters/one", ADMIN).json()
    answer = call(house, "PATCH", "/adapters/one", ADMIN, words)
    assert answer.status_code == 400
    assert said in answer.text
    if words:
        posted = call(house, "POST", "/adapters", ADMIN, {"name": "never", "src": "c", **words})
        assert posted.status_code == 400
        assert call(house, "GET", "/adapters/never", ADMIN).status_code == 404
        mixed = {"name": "never", "mixture": [{"adapter": "one"}], "threshold": 0.0}
        assert call(house, "POST", "/adapters", ADMIN, mixed).status_code == 400
    assert call(house, "GET", "/adapters/one", ADMIN).json() == before


def test_it_is_listed_last_and_described(house: Running) -> None:
    listed = call(house, "GET", "/v1/models", ADMIN).json()["data"]
    assert [each["id"] for each in listed] == [BASE, "one", "silent", "two", "auto"]
    assert call(house, "GET", "/v1/models/auto", ADMIN).json() == listed[-1]


def test_without_examples_there_is_no_such_model(files: Files, tmp_path: Path) -> None:
    with running(files, tmp_path) as server:
        call(server, "POST", "/adapters", None, {"name": "silent", "src": "c"})
        status, param, message = refused(server, WAYS[0], body_of(WAYS[0], "x"))
        assert (status, param) == (400, "model")
        assert "manylora_adapter.json" in message
        assert [each["id"] for each in call(server, "GET", "/v1/models", None).json()["data"]] == [
            BASE,
            "silent",
        ]
        assert call(server, "GET", "/v1/models/auto", ADMIN).status_code == 404
        assert server.metric("manylora_requests_total", adapter="auto", outcome="finished") is None


def test_a_key_is_given_to_what_it_may_use_alone(house: Running) -> None:
    text = EXAMPLES["one"][0]
    both, narrow, blind = (
        new_key(house, "acme", models=models) for models in ([BASE, "one", "two"], [BASE, "two"], ["silent"])
    )
    without_base = new_key(house, "acme", models=["two"])
    assert call(house, "POST", WAYS[0], both, body_of(WAYS[0], text)).json()["model"] == "one"
    told = call(house, "POST", WAYS[0], narrow, body_of(WAYS[0], text)).json()
    assert told["model"] in (BASE, "two")
    assert "one" not in json.dumps(told["auto"])
    assert names(house, narrow) == {BASE, "two", "auto"}
    assert names(house, blind) == {"silent"}
    assert refused(house, WAYS[0], body_of(WAYS[0], text), blind)[:2] == (400, "model")
    status, param, message = refused(house, WAYS[0], body_of(WAYS[0], NOBODYS), without_base)
    assert (status, param) == (400, "model")
    assert "may not use the base" in message
    own = call(house, "POST", WAYS[0], without_base, body_of(WAYS[0], EXAMPLES["two"][0]))
    assert own.json()["model"] == "two"


def test_what_was_read_counts_for_the_key_s_budget(house: Running) -> None:
    made = call(house, "POST", "/admin/keys", ADMIN, {"tenant": "acme", "budget": 10_000}).json()
    told = call(house, "POST", WAYS[0], made["key"], body_of(WAYS[0], EXAMPLES["one"][0])).json()
    house.wait_until(
        "settled",
        lambda: (
            call(house, "GET", f"/admin/keys/{made['id']}", ADMIN).json()["used"]
            == told["usage"]["total_tokens"] + told["auto"]["prompt_tokens"]
        ),
    )


def leave_while_it_is_chosen(server: Running) -> None:
    """Hang up while the prompt is read: nothing of that is left."""
    with server.held() as go_on:
        with asked(server, body_of(WAYS[0], NOBODYS), WAYS[0]):
            server.wait_until_busy()
        go_on.set()
    server.wait_until_idle()
    server.check_integrity()


def test_adapters_come_and_go_and_a_restart_reads_no_example_again(
    files: Files, adapters: None, tmp_path: Path
) -> None:
    text = EXAMPLES["two"][0]
    with running(files, tmp_path, auto_wait=30) as server:
        for name in ("one", "two", "other-two"):
            call(server, "POST", "/adapters", None, {"name": name, "src": name})
        assert ask(server, WAYS[0], text).json()["model"] in ("two", "other-two")
        leave_while_it_is_chosen(server)
        call(server, "DELETE", "/adapters/two", None)
        assert ask(server, WAYS[0], text).json()["model"] == "other-two"
        call(server, "DELETE", "/adapters/other-two", None)
        assert ask(server, WAYS[0], text).json()["model"] in ("one", BASE)
    with running(files, tmp_path, auto_wait=30) as server:
        assert ask(server, WAYS[0], EXAMPLES["one"][0]).json()["model"] == "one"
        assert server.metric("manylora_requests_total", adapter="auto", outcome="finished") == 1
