"""Errors as the openai client raises them."""

from pathlib import Path

import openai
import pytest

from tests.server.api.running import BASE, Files, Running, running

CHAT = {"messages": [{"role": "user", "content": "hello"}]}


def body_of(error: openai.APIStatusError) -> dict[str, object]:
    assert isinstance(error.body, dict)
    return error.body


def test_an_unknown_model_is_not_found_and_the_names_are_told(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        client.chat.completions.create(model="nobody", **CHAT)  # type: ignore[call-overload]
    assert raised.value.code == "model_not_found"
    assert raised.value.param == "model"
    assert raised.value.type == "invalid_request_error"
    for name in (BASE, "a", "b", "c"):
        assert name in str(body_of(raised.value)["message"])
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="nobody", prompt="x", stream=True)


def test_a_bad_value_names_its_field(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model="a", temperature=3, **CHAT)  # type: ignore[call-overload]
    assert raised.value.param == "temperature"
    assert "temperature" in raised.value.message


def test_an_error_carries_the_request_id(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        client.chat.completions.create(
            model="nobody",
            extra_headers={"x-request-id": "mine-1"},
            **CHAT,  # type: ignore[call-overload]
        )
    assert raised.value.request_id == "mine-1"
    assert raised.value.response.json()["request_id"] == "mine-1"


def test_an_answer_carries_a_request_id(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model="a", max_tokens=1, **CHAT)  # type: ignore[call-overload]
    assert raw.request_id
    assert raw.parse()._request_id == raw.request_id


def test_a_wrong_key_is_an_authentication_error(files: Files, tmp_path: Path) -> None:
    with running(files, tmp_path, api_key="secret,other", admin_key="boss") as server:
        for key in ("secret", "other", "boss"):
            with server.client(key) as client:
                assert client.models.list().data[0].id == BASE
        with server.client("guess") as client, pytest.raises(openai.AuthenticationError) as raised:
            client.chat.completions.create(model=BASE, **CHAT)  # type: ignore[call-overload]
        assert raised.value.code == "invalid_api_key"
        assert raised.value.response.headers["www-authenticate"] == "Bearer"


def test_a_fault_in_a_step_is_a_server_error_and_the_server_goes_on(
    server: Running, client: openai.OpenAI
) -> None:
    with server.failing(RuntimeError("secret detail")), pytest.raises(openai.InternalServerError) as raised:
        client.chat.completions.create(model="a", max_tokens=2, **CHAT)  # type: ignore[call-overload]
    assert raised.value.code == "step_failed"
    assert "server goes on" in raised.value.message
    assert "secret detail" not in raised.value.message
    assert client.chat.completions.create(model="a", max_tokens=2, **CHAT).choices  # type: ignore[call-overload]


def test_out_of_memory_is_a_server_error_and_the_server_goes_on(
    server: Running, client: openai.OpenAI
) -> None:
    with server.failing(MemoryError()), pytest.raises(openai.InternalServerError, match="out of memory"):
        client.completions.create(model=BASE, prompt="x")
    assert client.completions.create(model=BASE, prompt="x").choices


def test_a_fault_in_a_running_stream_is_an_event(server: Running, client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="a", max_tokens=900, stream=True, extra_body={"ignore_eos": True}, **CHAT
    )  # type: ignore[call-overload]
    next(stream)
    with server.failing(RuntimeError("x")), pytest.raises(openai.APIError) as raised:
        for _ in stream:
            pass
    assert raised.value.code == "step_failed"
